#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

namespace annulus {

/// Element types. Attention computes in f32, f16, bf16 (f64 in the reference); the integers and
/// `u8` (a boolean a byte) carry masks, segment ids, offsets and page tables.
enum class DType : std::uint8_t { f32, f16, bf16, f64, u8, i32, i64 };

std::int64_t size_bytes(DType dtype);
std::string_view name(DType dtype);
std::optional<DType> parse_dtype(std::string_view text);
bool is_floating(DType dtype);

/// Where memory lives.
enum class Device : std::uint8_t { cpu, cuda };

std::string_view name(Device device);

/// An opaque cudaStream_t; null is the default stream, and means nothing on the CPU.
struct Stream {
  void* handle = nullptr;
};

/// Half-open range of rows or positions.
struct Span {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  std::int64_t size() const { return end > begin ? end - begin : 0; }
  bool empty() const { return end <= begin; }
  bool contains(std::int64_t i) const { return begin <= i && i < end; }
  friend bool operator==(const Span&, const Span&) = default;
};

Span intersect(Span a, Span b);

/// Up to five extents, outermost first.
class Shape {
 public:
  static constexpr int kMaxRank = 5;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims);
  explicit Shape(std::span<const std::int64_t> dims);

  int rank() const { return rank_; }
  std::int64_t operator[](int dim) const { return dims_[static_cast<std::size_t>(dim)]; }
  std::int64_t& operator[](int dim) { return dims_[static_cast<std::size_t>(dim)]; }
  std::span<const std::int64_t> dims() const {
    return {dims_.data(), static_cast<std::size_t>(rank_)};
  }
  /// Product of the extents; throws bad_data when it does not fit 63 bits.
  std::int64_t elements() const;
  std::string to_string() const;  // "[2, 8, 3, 64]"
  friend bool operator==(const Shape&, const Shape&) = default;

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

/// Row-major strides, in elements.
Shape contiguous_strides(const Shape& shape);

/// Non-owning strided view, host or device. Strides count elements and may be 0 (a broadcast
/// dimension). A view with null data is absent: `if (view)`.
template <typename Pointer>
struct BasicTensorView {
  Pointer data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  Shape shape;
  Shape strides;

  BasicTensorView() = default;
  BasicTensorView(Pointer data_, DType dtype_, const Shape& shape_, Device device_ = Device::cpu)
      : data(data_),
        dtype(dtype_),
        device(device_),
        shape(shape_),
        strides(contiguous_strides(shape_)) {}
  BasicTensorView(Pointer data_, DType dtype_, const Shape& shape_, const Shape& strides_,
                  Device device_ = Device::cpu)
      : data(data_), dtype(dtype_), device(device_), shape(shape_), strides(strides_) {}
  /// A mutable view is also a const one.
  template <typename Other>
  requires(!std::is_same_v<Other, Pointer> && std::is_convertible_v<Other, Pointer>)
      BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(google-explicit-constructor)
      : data(other.data),
        dtype(other.dtype),
        device(other.device),
        shape(other.shape),
        strides(other.strides) {}

  explicit operator bool() const { return data != nullptr; }
  int rank() const { return shape.rank(); }
  bool is_contiguous() const;
  /// The same memory, restricted to `range` of dimension `dim`.
  BasicTensorView slice(int dim, Span range) const;
  /// The same memory with dimensions `a` and `b` exchanged, as [B,H,T,D] seen as [B,T,H,D].
  BasicTensorView transposed(int a, int b) const;
};

using TensorView = BasicTensorView<void*>;
using ConstTensorView = BasicTensorView<const void*>;

extern template struct BasicTensorView<void*>;
extern template struct BasicTensorView<const void*>;

}  // namespace annulus
