// Rows of tensors to and from fp32 working tiles.
#if defined(ANNULUS_CPU_PACK_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_PACK_INL
#undef ANNULUS_CPU_PACK_INL
#else
#define ANNULUS_CPU_PACK_INL
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/scalar.hpp"
#include "kernels/types.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Head dims are multiples of 8: vectors of at most 8 lanes leave no tail, and those of 16 leave one
// of 8.
using Eight = hn::CappedTag<float, 8>;
using Sixteen = hn::CappedTag<float, 16>;

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

/// Row stride of a working tile with `columns` used: whole vectors, and an odd number of cache
/// lines, so that a column of rows spreads over all sets of the cache.
inline std::int64_t tile_stride(std::int64_t columns) {
  return (round_up(columns, 16) / 16 | 1) * 16;
}

HWY_INLINE void load_row_f32(const float* HWY_RESTRICT from, std::int64_t n,
                             float* HWY_RESTRICT to) {
  const Sixteen wide;
  const Eight d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(wide));
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(hn::LoadU(wide, from + i), wide, to + i);
  if (i < n) hn::StoreU(hn::LoadU(d, from + i), d, to + i);
}

template <typename Half>
HWY_INLINE void load_row_half(const Half* HWY_RESTRICT from, std::int64_t n,
                              float* HWY_RESTRICT to) {
  const Sixteen wide;
  const hn::Rebind<Half, Sixteen> wide_half;
  const Eight d;
  const hn::Rebind<Half, Eight> dh;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(wide));
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::PromoteTo(wide, hn::LoadU(wide_half, from + i)), wide, to + i);
  }
  if (i < n) hn::StoreU(hn::PromoteTo(d, hn::LoadU(dh, from + i)), d, to + i);
}

/// Row of n elements (a multiple of 8) at element offset `at`, to fp32.
HWY_INLINE void load_row(const void* data, DType dtype, std::int64_t at, std::int64_t n,
                         float* HWY_RESTRICT to) {
  if (dtype == DType::f32) {
    load_row_f32(static_cast<const float*>(data) + at, n, to);
  } else if (dtype == DType::f16) {
    load_row_half(static_cast<const hwy::float16_t*>(data) + at, n, to);
  } else {
    load_row_half(static_cast<const hwy::bfloat16_t*>(data) + at, n, to);
  }
}

/// Asks for a row that is needed a few rows later. Rows of one head lie a page or more apart, and
/// the wait is mostly for the translation of its address.
HWY_INLINE void prefetch_row(const ConstTensorView& view, std::int64_t at) {
  const std::int64_t size = view.dtype == DType::f32 ? 4 : 2;
  const auto* row = static_cast<const char*>(view.data) + at * size;
  for (std::int64_t byte = 0; byte < view.shape[3] * size; byte += 64) {
    hwy::Prefetch(row + byte);
  }
}

inline constexpr std::int64_t kRowsAhead = 8;

// Round to nearest even; NaN keeps its sign and becomes quiet.
template <class D, class V = hn::Vec<D>>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> bf16_bits(D, V value) {
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
  const auto is_nan = hn::RebindMask(du, hn::Ne(value, value));
  return hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
}

HWY_INLINE void store_row_bf16(const float* HWY_RESTRICT from, std::int64_t n,
                               std::uint16_t* HWY_RESTRICT to) {
  const Eight d;
  const hn::Rebind<std::int32_t, Eight> di;
  const hn::Rebind<std::uint16_t, Eight> du16;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < n; i += lanes) {
    const auto bits = hn::BitCast(di, bf16_bits(d, hn::LoadU(d, from + i)));
    hn::StoreU(hn::DemoteTo(du16, bits), du16, to + i);
  }
}

/// Row of n fp32 elements (a multiple of 8) to element offset `at`.
HWY_INLINE void store_row(const float* HWY_RESTRICT from, std::int64_t n, void* data, DType dtype,
                          std::int64_t at) {
  if (dtype == DType::f32) {
    load_row_f32(from, n, static_cast<float*>(data) + at);
  } else if (dtype == DType::bf16) {
    store_row_bf16(from, n, static_cast<std::uint16_t*>(data) + at);
  } else {
    auto* to = static_cast<std::uint16_t*>(data) + at;
    for (std::int64_t i = 0; i < n; ++i) to[i] = float_to_f16(from[i]);
  }
}

/// to[c][r] = from[r][c]; rows and columns are multiples of 4 (or of one lane).
HWY_INLINE void transpose(const float* HWY_RESTRICT from, std::int64_t from_stride,
                          std::int64_t rows, std::int64_t columns, float* HWY_RESTRICT to,
                          std::int64_t to_stride) {
#if HWY_TARGET == HWY_SCALAR
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
#else
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<std::uint64_t, 2> dw;
  for (std::int64_t r = 0; r < rows; r += 4) {
    for (std::int64_t c = 0; c < columns; c += 4) {
      const float* in = from + r * from_stride + c;
      const auto r0 = hn::LoadU(d, in);
      const auto r1 = hn::LoadU(d, in + from_stride);
      const auto r2 = hn::LoadU(d, in + 2 * from_stride);
      const auto r3 = hn::LoadU(d, in + 3 * from_stride);
      const auto low01 = hn::BitCast(dw, hn::InterleaveLower(d, r0, r1));
      const auto low23 = hn::BitCast(dw, hn::InterleaveLower(d, r2, r3));
      const auto high01 = hn::BitCast(dw, hn::InterleaveUpper(d, r0, r1));
      const auto high23 = hn::BitCast(dw, hn::InterleaveUpper(d, r2, r3));
      float* out = to + c * to_stride + r;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dw, low01, low23)), d, out);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dw, low01, low23)), d, out + to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dw, high01, high23)), d, out + 2 * to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dw, high01, high23)), d, out + 3 * to_stride);
    }
  }
#endif
}

/// Panels [columns / 8, rows, 8] of rows [rows, columns]: row `row` of `rows`.
HWY_INLINE void store_in_panels(const float* HWY_RESTRICT from, std::int64_t columns,
                                std::int64_t rows, std::int64_t row, float* HWY_RESTRICT panels) {
  for (std::int64_t c = 0; c < columns; c += 8) {
    load_row_f32(from + c, 8, panels + c * rows + row * 8);
  }
}

/// Whether none of the values is infinite or NaN. A weight of 0 does not silence those in a
/// product, so an edge tile that holds one takes a slower way.
inline bool all_finite(const float* HWY_RESTRICT values, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, values + i, sizeof(bits));
    largest = std::max(largest, bits & 0x7fffffffU);
  }
  return largest < 0x7f800000U;
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_PACK_INL
