#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernels/cuda/check.hpp"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/strided_copy.hpp"
#include "kernels/cuda_support.hpp"

// One thread a word, in the order of the destination's dimensions: consecutive threads write
// consecutive words of a row-major destination. Words are as wide and dimensions as few as both
// views allow: dividing an index costs more than moving what it points to.
namespace annulus::kernels::cuda {
namespace {

/// Two views of one shape, walked together; strides in words.
struct PairedDims {
  int rank = 0;
  std::int64_t shape[Shape::kMaxRank] = {};
  std::int64_t from[Shape::kMaxRank] = {};
  std::int64_t to[Shape::kMaxRank] = {};

  std::int64_t count() const {
    std::int64_t words = 1;
    for (int dim = 0; dim < rank; ++dim) words *= shape[dim];
    return words;
  }
};

/// Without dimensions of one element; those that follow each other in both views are one.
PairedDims paired(const ConstTensorView& from, const TensorView& to) {
  PairedDims dims;
  for (int dim = 0; dim < to.rank(); ++dim) {
    if (to.shape[dim] == 1) continue;
    const int last = dims.rank - 1;
    const bool follows = last >= 0 && dims.from[last] == to.shape[dim] * from.strides[dim] &&
                         dims.to[last] == to.shape[dim] * to.strides[dim];
    const int at = follows ? last : dims.rank++;
    dims.shape[at] = (follows ? dims.shape[at] : 1) * to.shape[dim];
    dims.from[at] = from.strides[dim];
    dims.to[at] = to.strides[dim];
  }
  if (dims.rank > 0) return dims;
  dims.rank = 1;
  dims.shape[0] = dims.from[0] = dims.to[0] = 1;
  return dims;
}

/// The widest word, in bytes, of which rows, strides and addresses of both views are multiples.
std::int64_t word_bytes(const PairedDims& dims, const void* from, const void* to,
                        std::int64_t element) {
  const int last = dims.rank - 1;
  if (dims.from[last] != 1 || dims.to[last] != 1) return element;
  auto bits = reinterpret_cast<std::uintptr_t>(from) | reinterpret_cast<std::uintptr_t>(to) |
              static_cast<std::uintptr_t>(dims.shape[last] * element) | sizeof(uint4);
  for (int dim = 0; dim < last; ++dim) {
    bits |= static_cast<std::uintptr_t>(dims.from[dim] * element) |
            static_cast<std::uintptr_t>(dims.to[dim] * element);
  }
  return static_cast<std::int64_t>(bits & (~bits + 1));  // the lowest bit
}

PairedDims in_words(PairedDims dims, std::int64_t elements) {
  const int last = dims.rank - 1;
  dims.shape[last] /= elements;
  for (int dim = 0; dim < last; ++dim) {
    dims.from[dim] /= elements;
    dims.to[dim] /= elements;
  }
  return dims;
}

struct Offsets {
  std::int64_t from;
  std::int64_t to;
};

template <typename Index>
__device__ Offsets offsets_of(Index index, const PairedDims& dims) {
  Offsets offsets{0, 0};
#pragma unroll
  for (int dim = Shape::kMaxRank - 1; dim > 0; --dim) {
    if (dim >= dims.rank) continue;
    const auto extent = static_cast<Index>(dims.shape[dim]);
    const Index rest = index / extent;
    const Index i = index - rest * extent;
    index = rest;
    offsets.from += i * dims.from[dim];
    offsets.to += i * dims.to[dim];
  }
  offsets.from += index * dims.from[0];
  offsets.to += index * dims.to[0];
  return offsets;
}

template <typename Index, typename Move>
__global__ void for_each_word(PairedDims dims, Index count, Move move) {
  const Index step = gridDim.x * static_cast<Index>(kThreads);
  for (Index i = blockIdx.x * static_cast<Index>(kThreads) + threadIdx.x; i < count; i += step) {
    const Offsets at = offsets_of(i, dims);
    move(at.from, at.to);
  }
}

template <typename Word>
struct CopyWord {
  const Word* from;
  Word* to;
  __device__ void operator()(std::int64_t i, std::int64_t j) const { to[j] = from[i]; }
};

struct Convert {
  DeviceView from;
  DeviceView to;
  __device__ void operator()(std::int64_t i, std::int64_t j) const {
    store_float(to, j, load_float(from, i));
  }
};

struct AddFloat {
  const float* from;
  float* into;
  __device__ void operator()(std::int64_t i, std::int64_t j) const { into[j] += from[i]; }
};

struct AddConverted {
  DeviceView from;
  float* into;
  __device__ void operator()(std::int64_t i, std::int64_t j) const {
    into[j] += load_float(from, i);
  }
};

struct AddFloats {
  const float4* from;
  float4* into;
  __device__ void operator()(std::int64_t i, std::int64_t j) const {
    const float4 more = from[i];
    float4 sum = into[j];
    sum.x += more.x;
    sum.y += more.y;
    sum.z += more.z;
    sum.w += more.w;
    into[j] = sum;
  }
};

template <typename Move>
void launch(const PairedDims& dims, const Move& move, cudaStream_t stream) {
  const std::int64_t count = dims.count();
  const unsigned blocks = blocks_for(count);
  // The last step of a thread goes beyond the count.
  if (count + std::int64_t{blocks} * kThreads <= std::numeric_limits<std::uint32_t>::max()) {
    for_each_word<std::uint32_t>
        <<<blocks, kThreads, 0, stream>>>(dims, static_cast<std::uint32_t>(count), move);
  } else {
    for_each_word<std::uint64_t>
        <<<blocks, kThreads, 0, stream>>>(dims, static_cast<std::uint64_t>(count), move);
  }
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

template <typename Word>
void copy_words(const PairedDims& dims, const void* from, void* to, cudaStream_t stream) {
  launch(dims, CopyWord<Word>{static_cast<const Word*>(from), static_cast<Word*>(to)}, stream);
}

}  // namespace

void accumulate(ConstTensorView from, TensorView into, Stream stream) {
  if (from.shape.elements() == 0) return;
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  const PairedDims dims = paired(from, into);
  if (from.dtype != DType::f32) {
    return launch(dims, AddConverted{DeviceView::of(from), static_cast<float*>(into.data)}, handle);
  }
  if (word_bytes(dims, from.data, into.data, sizeof(float)) == sizeof(float4)) {
    const AddFloats add{static_cast<const float4*>(from.data), static_cast<float4*>(into.data)};
    return launch(in_words(dims, 4), add, handle);
  }
  launch(dims, AddFloat{static_cast<const float*>(from.data), static_cast<float*>(into.data)},
         handle);
}

void strided_copy(const ConstTensorView& from, const TensorView& to, cudaStream_t stream) {
  if (from.shape.elements() == 0) return;
  PairedDims dims = paired(from, to);
  if (from.dtype != to.dtype) {
    return launch(dims, Convert{DeviceView::of(from), DeviceView::of(to)}, stream);
  }
  const std::int64_t element = size_bytes(from.dtype);
  const std::int64_t word = word_bytes(dims, from.data, to.data, element);
  dims = in_words(dims, word / element);
  switch (word) {
    case 1:
      return copy_words<std::uint8_t>(dims, from.data, to.data, stream);
    case 2:
      return copy_words<std::uint16_t>(dims, from.data, to.data, stream);
    case 4:
      return copy_words<std::uint32_t>(dims, from.data, to.data, stream);
    case 8:
      return copy_words<std::uint64_t>(dims, from.data, to.data, stream);
    default:
      return copy_words<uint4>(dims, from.data, to.data, stream);
  }
}

}  // namespace annulus::kernels::cuda
