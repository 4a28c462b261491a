#include "kernels/host_copy.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/cpu/targets.hpp"
#include "kernels/element.hpp"
#include "kernels/scalar.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/host_copy.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#ifndef ANNULUS_KERNELS_HOST_COPY_TYPES
#define ANNULUS_KERNELS_HOST_COPY_TYPES
namespace annulus::kernels {

/// A row of elements on both sides; strides count elements.
struct RowPair {
  const void* from = nullptr;
  std::int64_t from_stride = 1;
  void* to = nullptr;
  std::int64_t to_stride = 1;
  std::int64_t count = 0;

  bool dense() const { return from_stride == 1 && to_stride == 1; }
};

using RowFunction = void (*)(const RowPair& row);

}  // namespace annulus::kernels
#endif

// The plain loops below are compiled once for each target: the compiler's vectors are as wide as
// the processor's, and conversions between 16 and 32 bits need no more than that.
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

struct F32 {
  using Stored = float;
  static float load(float v) { return v; }
  static float store(float v) { return v; }
};

struct F64 {
  using Stored = double;
  static double load(double v) { return v; }
  static double store(double v) { return v; }
};

struct F16 {
  using Stored = std::uint16_t;
  static float load(std::uint16_t v) { return f16_to_float(v); }
  static std::uint16_t store(float v) { return float_to_f16(v); }
};

struct BF16 {
  using Stored = std::uint16_t;
  static float load(std::uint16_t v) { return bf16_to_float(v); }
  static std::uint16_t store(float v) { return float_to_bf16(v); }
};

template <typename From, typename To>
void ConvertRow(const RowPair& row) {
  using Wide = decltype(To::load({}));
  const auto* HWY_RESTRICT from = static_cast<const typename From::Stored*>(row.from);
  auto* HWY_RESTRICT to = static_cast<typename To::Stored*>(row.to);
  if (row.dense()) {
    for (std::int64_t i = 0; i < row.count; ++i) {
      to[i] = To::store(static_cast<Wide>(From::load(from[i])));
    }
    return;
  }
  for (std::int64_t i = 0; i < row.count; ++i) {
    to[i * row.to_stride] = To::store(static_cast<Wide>(From::load(from[i * row.from_stride])));
  }
}

template <typename From>
RowFunction ConversionFrom(DType to) {
  switch (to) {
    case DType::f32:
      return &ConvertRow<From, F32>;
    case DType::f16:
      return &ConvertRow<From, F16>;
    case DType::bf16:
      return &ConvertRow<From, BF16>;
    case DType::f64:
      return &ConvertRow<From, F64>;
    default:
      return nullptr;
  }
}

/// Null where an integer is involved.
RowFunction Conversion(DType from, DType to) {
  switch (from) {
    case DType::f32:
      return ConversionFrom<F32>(to);
    case DType::f16:
      return ConversionFrom<F16>(to);
    case DType::bf16:
      return ConversionFrom<BF16>(to);
    case DType::f64:
      return ConversionFrom<F64>(to);
    default:
      return nullptr;
  }
}

void AddRow(const RowPair& row) {
  const auto* HWY_RESTRICT from = static_cast<const float*>(row.from);
  auto* HWY_RESTRICT into = static_cast<float*>(row.to);
  if (row.dense()) {
    for (std::int64_t i = 0; i < row.count; ++i) into[i] += from[i];
    return;
  }
  for (std::int64_t i = 0; i < row.count; ++i) into[i * row.to_stride] += from[i * row.from_stride];
}

RowFunction Addition() { return &AddRow; }

}  // namespace
}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus::kernels {
namespace {

HWY_EXPORT(Conversion);
HWY_EXPORT(Addition);

template <typename Bits>
void copy_bits(const RowPair& row) {
  const auto* from = static_cast<const Bits*>(row.from);
  auto* to = static_cast<Bits*>(row.to);
  for (std::int64_t i = 0; i < row.count; ++i) to[i * row.to_stride] = from[i * row.from_stride];
}

struct Dimension {
  std::int64_t count = 1;
  std::int64_t from_stride = 0;
  std::int64_t to_stride = 0;
};

using Dimensions = std::array<Dimension, Shape::kMaxRank>;

/// The dimensions of both views, the last of them rows: the written side's largest stride first,
/// and one for all that both sides walk without a gap. Extents of 1 fill the front.
Dimensions merged(const ConstTensorView& from, const TensorView& to) {
  std::vector<Dimension> dims;
  for (int dim = 0; dim < from.rank(); ++dim) {
    if (from.shape[dim] != 1) dims.push_back({from.shape[dim], from.strides[dim], to.strides[dim]});
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dimension& a, const Dimension& b) {
    return std::abs(a.to_stride) > std::abs(b.to_stride);
  });
  Dimensions result;
  result.back() = {1, 1, 1};
  auto at = result.end();
  for (auto outer = dims.rbegin(); outer != dims.rend(); ++outer) {
    if (at != result.end() && outer->from_stride == at->from_stride * at->count &&
        outer->to_stride == at->to_stride * at->count) {
      at->count *= outer->count;
    } else {
      *--at = *outer;
    }
  }
  return result;
}

template <typename Visit>
void for_each_row(const ConstTensorView& from, const TensorView& to, const Visit& visit) {
  static_assert(Shape::kMaxRank == 5);
  const Dimensions dims = merged(from, to);
  // References by name: clang before 16 cannot capture structured bindings.
  const auto &a = dims[0], &b = dims[1], &c = dims[2], &d = dims[3], &row = dims[4];
  const std::int64_t from_bytes = size_bytes(from.dtype), to_bytes = size_bytes(to.dtype);
  const auto visit_at = [&](std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t l) {
    const std::int64_t from_offset =
        i * a.from_stride + j * b.from_stride + k * c.from_stride + l * d.from_stride;
    const std::int64_t to_offset =
        i * a.to_stride + j * b.to_stride + k * c.to_stride + l * d.to_stride;
    visit(RowPair{static_cast<const char*>(from.data) + from_offset * from_bytes, row.from_stride,
                  static_cast<char*>(to.data) + to_offset * to_bytes, row.to_stride, row.count});
  };
  for (std::int64_t i = 0; i < a.count; ++i) {
    for (std::int64_t j = 0; j < b.count; ++j) {
      for (std::int64_t k = 0; k < c.count; ++k) {
        for (std::int64_t l = 0; l < d.count; ++l) visit_at(i, j, k, l);
      }
    }
  }
}

RowFunction bits_of(std::int64_t bytes) {
  switch (bytes) {
    case 1:
      return &copy_bits<std::uint8_t>;
    case 2:
      return &copy_bits<std::uint16_t>;
    case 4:
      return &copy_bits<std::uint32_t>;
    default:
      return &copy_bits<std::uint64_t>;
  }
}

}  // namespace

void host_copy(const ConstTensorView& from, const TensorView& to) {
  if (from.shape.elements() == 0) return;
  if (from.dtype == to.dtype) {
    const std::int64_t bytes = size_bytes(from.dtype);
    const RowFunction strided = bits_of(bytes);
    return for_each_row(from, to, [&](const RowPair& row) {
      if (!row.dense()) return strided(row);
      std::memcpy(row.to, row.from, static_cast<std::size_t>(row.count * bytes));
    });
  }
  if (const RowFunction convert = HWY_DYNAMIC_DISPATCH(Conversion)(from.dtype, to.dtype)) {
    return for_each_row(from, to, convert);
  }
  for_each_row(from, to, [&](const RowPair& row) {
    for (std::int64_t i = 0; i < row.count; ++i) {
      store_element(row.to, to.dtype, i * row.to_stride,
                    load_element(row.from, from.dtype, i * row.from_stride));
    }
  });
}

void host_accumulate(const ConstTensorView& from, const TensorView& into) {
  if (from.shape.elements() == 0) return;
  for_each_row(from, into, HWY_DYNAMIC_DISPATCH(Addition)());
}

}  // namespace annulus::kernels
#endif  // HWY_ONCE
