#include <algorithm>
#include <limits>

#include "kernels/buffer.hpp"
#include "kernels/cuda/check.hpp"
#include "kernels/cuda/strided_copy.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cuda {
namespace {

cudaStream_t handle_of(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

std::int64_t bytes_of(const ConstTensorView& view) {
  return view.shape.elements() * size_bytes(view.dtype);
}

void copy_bytes(const ConstTensorView& from, const TensorView& to, Stream stream) {
  ANNULUS_CHECK_CUDA(cudaMemcpyAsync(to.data, from.data, static_cast<std::size_t>(bytes_of(from)),
                                     cudaMemcpyDefault, handle_of(stream)));
}

// Device to device where strides or dtypes differ: one kernel.
void copy_on_device(const ConstTensorView& from, const TensorView& to, Stream stream) {
  if (from.dtype == to.dtype && from.is_contiguous() && to.is_contiguous()) {
    return copy_bytes(from, to, stream);
  }
  require(from.dtype == to.dtype || (is_floating(from.dtype) && is_floating(to.dtype)),
          ExitCode::internal, "cuda: no copy of {} to {} on the device", name(from.dtype),
          name(to.dtype));
  strided_copy(from, to, handle_of(stream));
}

// The host side is packed and converted by the processor, the device side by a kernel.
void copy_to_device(const ConstTensorView& from, const TensorView& to, Stream stream) {
  if (from.dtype != to.dtype || !from.is_contiguous()) {
    const Buffer packed(Device::cpu, from.shape.elements() * size_bytes(to.dtype));
    const TensorView host(packed.data(), to.dtype, from.shape);
    annulus::copy(from, host);
    copy_to_device(host, to, stream);
    return synchronize(stream);  // `packed` ends here
  }
  if (to.is_contiguous()) return copy_bytes(from, to, stream);
  const Buffer arrived(Device::cuda, bytes_of(from), stream);
  const TensorView device(arrived.data(), from.dtype, from.shape, Device::cuda);
  copy_bytes(from, device, stream);
  copy_on_device(device, to, stream);
}

void copy_to_host(const ConstTensorView& from, const TensorView& to, Stream stream) {
  if (!from.is_contiguous()) {
    const Buffer packed(Device::cuda, bytes_of(from), stream);
    const TensorView device(packed.data(), from.dtype, from.shape, Device::cuda);
    copy_on_device(from, device, stream);
    return copy_to_host(device, to, stream);
  }
  if (from.dtype == to.dtype && to.is_contiguous()) {
    copy_bytes(from, to, stream);
    return synchronize(stream);
  }
  const Buffer arrived(Device::cpu, bytes_of(from));
  const TensorView host(arrived.data(), from.dtype, from.shape);
  copy_bytes(from, host, stream);
  synchronize(stream);
  annulus::copy(host, to);
}

}  // namespace

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();  // no driver or no device: the machine has none
  return 0;
}

DeviceIdentity device_identity() {
  int device = 0;
  cudaDeviceProp properties{};
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  ANNULUS_CHECK_CUDA(cudaGetDeviceProperties(&properties, device));
  DeviceIdentity identity{};
  static_assert(sizeof(properties.uuid.bytes) == sizeof(identity));
  std::copy_n(properties.uuid.bytes, identity.size(), identity.begin());
  return identity;
}

void use_device(int device) {
  ANNULUS_CHECK_CUDA(cudaSetDevice(device));
  // What is freed stays with the process: to map memory again takes longer than many a kernel, and
  // by default every synchronization unmaps it.
  cudaMemPool_t pool = nullptr;
  std::uint64_t kept_bytes = std::numeric_limits<std::uint64_t>::max();
  ANNULUS_CHECK_CUDA(cudaDeviceGetDefaultMemPool(&pool, device));
  ANNULUS_CHECK_CUDA(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept_bytes));
}

void* allocate(std::int64_t bytes, Stream stream) {
  void* data = nullptr;
  const cudaError_t error =
      cudaMallocAsync(&data, static_cast<std::size_t>(bytes), handle_of(stream));
  if (error == cudaErrorMemoryAllocation) {
    std::size_t available = 0;
    std::size_t total = 0;
    cudaGetLastError();
    cudaMemGetInfo(&available, &total);
    throw Error(ExitCode::no_memory,
                fmt::format("memory: {} bytes wanted on the device, {} of {} available", bytes,
                            available, total));
  }
  ANNULUS_CHECK_CUDA(error);
  return data;
}

// A destructor calls this: an error here belongs to earlier work, and its next call reports it.
void release(void* data, Stream stream) noexcept { cudaFreeAsync(data, handle_of(stream)); }

void fill_bytes(void* data, int value, std::int64_t bytes, Stream stream) {
  ANNULUS_CHECK_CUDA(
      cudaMemsetAsync(data, value, static_cast<std::size_t>(bytes), handle_of(stream)));
}

void copy(ConstTensorView from, TensorView to, Stream stream) {
  if (from.device == Device::cuda && to.device == Device::cuda) {
    return copy_on_device(from, to, stream);
  }
  if (to.device == Device::cuda) return copy_to_device(from, to, stream);
  copy_to_host(from, to, stream);
}

void synchronize(Stream stream) { ANNULUS_CHECK_CUDA(cudaStreamSynchronize(handle_of(stream))); }

}  // namespace annulus::kernels::cuda
