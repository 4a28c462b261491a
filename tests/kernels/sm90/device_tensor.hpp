#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/buffer.hpp"

namespace annulus {

/// A 16-bit tensor [batch, seq, heads, dim] on the device in the middle of a buffer of NaN, with
/// padding tokens around each batch row, and a host copy of its values in fp32.
struct DeviceTensor {
  static constexpr std::int64_t kPadding = 16;

  std::vector<float> host;
  Shape shape;
  Buffer memory;
  TensorView view;

  DeviceTensor(const Shape& shape_, DType dtype, std::mt19937& random)
      : host(static_cast<std::size_t>(shape_.elements())), shape(shape_) {
    std::normal_distribution<float> normal;
    for (float& value : host) value = normal(random);
    const Shape padded{shape[0], shape[1] + 2 * kPadding, shape[2], shape[3]};
    memory = Buffer(Device::cuda, padded.elements() * size_bytes(dtype));
    fill_bytes(memory.data(), Device::cuda, 0xff, memory.bytes());
    view = TensorView(memory.data(), dtype, padded, Device::cuda)
               .slice(1, {kPadding, kPadding + shape[1]});
    if (host.empty()) return;
    copy(host_view(), view);
    copy(view, TensorView(host.data(), DType::f32, shape));  // the rounded values
  }

  ConstTensorView host_view() const { return {host.data(), DType::f32, shape}; }
  float largest() const {
    float most = 0.0F;
    for (const float value : host) most = std::max(most, std::abs(value));
    return most;
  }
};

/// Numbers on the device, fp32 unless said, filled with NaN.
struct DeviceFloats {
  Shape shape;
  DType dtype;
  Buffer memory;

  explicit DeviceFloats(const Shape& shape_, DType dtype_ = DType::f32)
      : shape(shape_),
        dtype(dtype_),
        memory(Device::cuda, std::max<std::int64_t>(shape_.elements(), 1) * size_bytes(dtype_)) {
    fill_bytes(memory.data(), Device::cuda, 0xff, memory.bytes());
  }
  TensorView view() const { return {memory.data(), dtype, shape, Device::cuda}; }
  std::vector<float> fetched() const {
    std::vector<float> values(static_cast<std::size_t>(shape.elements()));
    if (!values.empty()) copy(view(), TensorView(values.data(), DType::f32, shape));
    return values;
  }
};

}  // namespace annulus
