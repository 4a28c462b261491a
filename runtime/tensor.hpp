#pragma once

#include <optional>

#include "kernels/buffer.hpp"
#include "kernels/types.hpp"

namespace annulus {

/// A tensor that owns its memory, or borrows the caller's. Move-only; empty by default. A tensor of
/// no elements is still present: its view is true.
class Tensor {
 public:
  Tensor() = default;
  /// Row-major and uninitialised. Throws no_memory with the bytes wanted.
  Tensor(DType dtype, const Shape& shape, Device device = Device::cpu, Stream stream = {});
  /// `view` lies in `buffer`.
  Tensor(Buffer buffer, const TensorView& view);
  /// The caller keeps the memory alive and may use it meanwhile.
  static Tensor borrow(const TensorView& view);
  /// A row-major copy, of another dtype or on another device where given.
  static Tensor copy_of(const ConstTensorView& view, std::optional<DType> dtype = std::nullopt,
                        std::optional<Device> device = std::nullopt, Stream stream = {});

  explicit operator bool() const { return static_cast<bool>(view_); }
  TensorView view() { return view_; }
  ConstTensorView view() const { return view_; }
  const Shape& shape() const { return view_.shape; }
  DType dtype() const { return view_.dtype; }
  Device device() const { return view_.device; }

 private:
  Buffer buffer_;
  TensorView view_;
};

}  // namespace annulus
