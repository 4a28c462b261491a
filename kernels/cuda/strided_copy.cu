#include "kernels/cuda/check.hpp"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/strided_copy.hpp"
#include "kernels/cuda_support.hpp"

// One thread an element, in the order of the destination's dimensions: consecutive threads write
// consecutive elements of a row-major destination.
namespace annulus::kernels::cuda {
namespace {

struct Offsets {
  std::int64_t from;
  std::int64_t to;
};

__device__ Offsets offsets_of(std::int64_t index, const DeviceView& from, const DeviceView& to) {
  Offsets offsets{0, 0};
  for (int dim = to.rank - 1; dim >= 0; --dim) {
    const std::int64_t i = index % to.shape[dim];
    index /= to.shape[dim];
    offsets.from += i * from.strides[dim];
    offsets.to += i * to.strides[dim];
  }
  return offsets;
}

template <typename Word>
__global__ void copy_words(DeviceView from, DeviceView to, std::int64_t count) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < count; i += step) {
    const Offsets at = offsets_of(i, from, to);
    static_cast<Word*>(to.data)[at.to] = static_cast<const Word*>(from.data)[at.from];
  }
}

__global__ void convert(DeviceView from, DeviceView to, std::int64_t count) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < count; i += step) {
    const Offsets at = offsets_of(i, from, to);
    store_float(to, at.to, load_float(from, at.from));
  }
}

__global__ void add_to_floats(DeviceView from, DeviceView into, std::int64_t count) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < count; i += step) {
    const Offsets at = offsets_of(i, from, into);
    static_cast<float*>(into.data)[at.to] += load_float(from, at.from);
  }
}

}  // namespace

void accumulate(ConstTensorView from, TensorView into, Stream stream) {
  const std::int64_t count = from.shape.elements();
  if (count == 0) return;
  add_to_floats<<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
      DeviceView::of(from), DeviceView::of(into), count);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

void strided_copy(const ConstTensorView& from, const TensorView& to, cudaStream_t stream) {
  const std::int64_t count = from.shape.elements();
  if (count == 0) return;
  const DeviceView source = DeviceView::of(from);
  const DeviceView target = DeviceView::of(to);
  const unsigned blocks = blocks_for(count);
  if (from.dtype != to.dtype) {
    convert<<<blocks, kThreads, 0, stream>>>(source, target, count);
  } else if (size_bytes(from.dtype) == 1) {
    copy_words<std::uint8_t><<<blocks, kThreads, 0, stream>>>(source, target, count);
  } else if (size_bytes(from.dtype) == 2) {
    copy_words<std::uint16_t><<<blocks, kThreads, 0, stream>>>(source, target, count);
  } else if (size_bytes(from.dtype) == 4) {
    copy_words<std::uint32_t><<<blocks, kThreads, 0, stream>>>(source, target, count);
  } else {
    copy_words<std::uint64_t><<<blocks, kThreads, 0, stream>>>(source, target, count);
  }
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

}  // namespace annulus::kernels::cuda
