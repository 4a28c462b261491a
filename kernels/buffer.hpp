#pragma once

#include <cstdint>

#include "kernels/types.hpp"

namespace annulus {

/// Owns bytes on one device, 64-byte aligned at least. Device memory is stream-ordered: allocated
/// and freed on `stream`. Throws no_memory with the bytes wanted.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device device, std::int64_t bytes, Stream stream = {});
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }
  Device device() const { return device_; }

 private:
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
  Device device_ = Device::cpu;
  Stream stream_;
};

/// Sets all bytes, in stream order on a device.
void fill_bytes(void* data, Device device, int value, std::int64_t bytes, Stream stream = {});

/// Sets every element to 0, in stream order on a device; any strides.
void clear(const TensorView& view, Stream stream = {});

/// Copies elements between views of equal shape, converting the dtype; any strides. Host to host,
/// host to device and back, device to device. Throws bad_data when the shapes differ.
void copy(ConstTensorView from, TensorView to, Stream stream = {});

/// into += from, for f32 views of equal shape and any strides. Throws bad_data when they differ.
void accumulate(ConstTensorView from, TensorView into, Stream stream = {});

/// Returns once all work queued on `stream` is done (at once on the CPU).
void synchronize(Device device, Stream stream);

}  // namespace annulus
