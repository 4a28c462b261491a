#include "runtime/tensor.hpp"

#include <algorithm>
#include <utility>

#include "kernels/error.hpp"

namespace annulus {
namespace {

/// At least one byte, so that an empty shard is not taken for an absent tensor.
std::int64_t bytes_of(DType dtype, const Shape& shape) {
  std::int64_t bytes = 0;
  require(!__builtin_mul_overflow(shape.elements(), size_bytes(dtype), &bytes), ExitCode::bad_data,
          "tensor: {} of {} does not fit 63 bits", shape.to_string(), name(dtype));
  return std::max<std::int64_t>(bytes, 1);
}

}  // namespace

Tensor::Tensor(DType dtype, const Shape& shape, Device device, Stream stream)
    : buffer_(device, bytes_of(dtype, shape), stream),
      view_(buffer_.data(), dtype, shape, device) {}

Tensor::Tensor(Buffer buffer, const TensorView& view) : buffer_(std::move(buffer)), view_(view) {}

Tensor Tensor::borrow(const TensorView& view) { return Tensor(Buffer(), view); }

Tensor Tensor::copy_of(const ConstTensorView& view, std::optional<DType> dtype,
                       std::optional<Device> device, Stream stream) {
  Tensor tensor(dtype.value_or(view.dtype), view.shape, device.value_or(view.device), stream);
  copy(view, tensor.view(), stream);
  return tensor;
}

}  // namespace annulus
