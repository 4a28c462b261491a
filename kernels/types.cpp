#include "kernels/types.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "kernels/error.hpp"

namespace annulus {
namespace {

struct DTypeRow {
  DType dtype;
  std::string_view name;
  std::int64_t bytes;
};

constexpr std::array kDTypes{DTypeRow{DType::f32, "f32", 4},   DTypeRow{DType::f16, "f16", 2},
                             DTypeRow{DType::bf16, "bf16", 2}, DTypeRow{DType::f64, "f64", 8},
                             DTypeRow{DType::u8, "u8", 1},     DTypeRow{DType::i32, "i32", 4},
                             DTypeRow{DType::i64, "i64", 8}};

const DTypeRow& row_of(DType dtype) { return kDTypes.at(static_cast<std::size_t>(dtype)); }

}  // namespace

std::int64_t size_bytes(DType dtype) { return row_of(dtype).bytes; }
std::string_view name(DType dtype) { return row_of(dtype).name; }
std::string_view name(Device device) { return device == Device::cpu ? "cpu" : "cuda"; }

std::optional<DType> parse_dtype(std::string_view text) {
  for (const DTypeRow& row : kDTypes) {
    if (row.name == text) return row.dtype;
  }
  return std::nullopt;
}

bool is_floating(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f64;
}

Span intersect(Span a, Span b) {
  const Span both{std::max(a.begin, b.begin), std::min(a.end, b.end)};
  return both.empty() ? Span{both.begin, both.begin} : both;
}

Shape::Shape(std::initializer_list<std::int64_t> dims)
    : Shape(std::span<const std::int64_t>(dims.begin(), dims.size())) {}

Shape::Shape(std::span<const std::int64_t> dims) : rank_(static_cast<int>(dims.size())) {
  require(rank_ <= kMaxRank, ExitCode::internal, "shape: {} dimensions; at most {}", rank_,
          kMaxRank);
  std::copy(dims.begin(), dims.end(), dims_.begin());
}

std::int64_t Shape::elements() const {
  std::int64_t product = 1;
  for (const std::int64_t dim : dims()) {
    if (dim >= 0 && !__builtin_mul_overflow(product, dim, &product)) continue;
    throw Error(ExitCode::bad_data,
                fmt::format("shape {}: the number of elements does not fit 63 bits", to_string()));
  }
  return product;
}

std::string Shape::to_string() const { return fmt::format("[{}]", fmt::join(dims(), ", ")); }

Shape contiguous_strides(const Shape& shape) {
  Shape strides = shape;
  std::int64_t stride = 1;
  for (int dim = shape.rank() - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= std::max<std::int64_t>(shape[dim], 1);
  }
  return strides;
}

template <typename Pointer>
bool BasicTensorView<Pointer>::is_contiguous() const {
  const Shape wanted = contiguous_strides(shape);
  for (int dim = 0; dim < rank(); ++dim) {
    if (shape[dim] > 1 && strides[dim] != wanted[dim]) return false;
  }
  return true;
}

template <typename Pointer>
BasicTensorView<Pointer> BasicTensorView<Pointer>::slice(int dim, Span range) const {
  const bool inside = 0 <= dim && dim < rank() && 0 <= range.begin && range.begin <= range.end &&
                      range.end <= shape[dim];
  if (!inside) {  // text only then: copies slice row by row
    throw Error(ExitCode::internal, fmt::format("slice: [{}, {}) of dimension {} of {}",
                                                range.begin, range.end, dim, shape.to_string()));
  }
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  BasicTensorView part = *this;
  if (data != nullptr) {
    part.data = static_cast<Byte*>(data) + range.begin * strides[dim] * size_bytes(dtype);
  }
  part.shape[dim] = range.size();
  return part;
}

template <typename Pointer>
BasicTensorView<Pointer> BasicTensorView<Pointer>::transposed(int a, int b) const {
  BasicTensorView view = *this;
  std::swap(view.shape[a], view.shape[b]);
  std::swap(view.strides[a], view.strides[b]);
  return view;
}

template struct BasicTensorView<void*>;
template struct BasicTensorView<const void*>;

}  // namespace annulus
