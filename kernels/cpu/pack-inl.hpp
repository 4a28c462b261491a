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
#include "kernels/cpu/transpose-inl.hpp"
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

/// Visits a row of n elements, a multiple of 8, by vectors: their tag and first element.
template <typename Visit>
HWY_INLINE void for_each_part(std::int64_t n, const Visit& visit) {
  const Sixteen wide;
  const Eight d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(wide));
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) visit(wide, i);
  if (i < n) visit(d, i);
}

HWY_INLINE void load_row_f32(const float* HWY_RESTRICT from, std::int64_t n,
                             float* HWY_RESTRICT to) {
  for_each_part(
      n, [&](auto d, std::int64_t i) HWY_ATTR { hn::StoreU(hn::LoadU(d, from + i), d, to + i); });
}

template <typename Half>
HWY_INLINE void load_row_half(const Half* HWY_RESTRICT from, std::int64_t n,
                              float* HWY_RESTRICT to) {
  for_each_part(n, [&](auto d, std::int64_t i) HWY_ATTR {
    const hn::Rebind<Half, decltype(d)> dh;
    hn::StoreU(hn::PromoteTo(d, hn::LoadU(dh, from + i)), d, to + i);
  });
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
  for_each_part(n, [&](auto d, std::int64_t i) HWY_ATTR {
    const hn::Rebind<std::int32_t, decltype(d)> di;
    const hn::Rebind<std::uint16_t, decltype(d)> du16;
    const auto bits = hn::BitCast(di, bf16_bits(d, hn::LoadU(d, from + i)));
    hn::StoreU(hn::DemoteTo(du16, bits), du16, to + i);
  });
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

/// As store_row, but past the caches where the row is whole lines: its lines need not be fetched to
/// be overwritten. The caller ends with hwy::FlushStream.
HWY_INLINE void stream_row(const float* HWY_RESTRICT from, std::int64_t n, void* data, DType dtype,
                           std::int64_t at) {
  char* to = static_cast<char*>(data) + at * size_bytes(dtype);
  const bool whole_lines =
      (reinterpret_cast<std::uintptr_t>(to) | static_cast<std::uintptr_t>(n * size_bytes(dtype))) %
          64 ==
      0;
  if (whole_lines && dtype == DType::f32) {
    for_each_part(n, [&](auto d, std::int64_t i) HWY_ATTR {
      hn::Stream(hn::LoadU(d, from + i), d, reinterpret_cast<float*>(to) + i);
    });
    return;
  }
#if HWY_TARGET == HWY_AVX3
  if (whole_lines && dtype == DType::bf16) {
    const Sixteen d;
    const hn::Rebind<std::int32_t, Sixteen> di;
    const hn::Rebind<std::uint16_t, Sixteen> du16;
    for (std::int64_t i = 0; i < n; i += 32) {
      const auto low = hn::BitCast(di, bf16_bits(d, hn::LoadU(d, from + i)));
      const auto high = hn::BitCast(di, bf16_bits(d, hn::LoadU(d, from + i + 16)));
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 2 * i),
                          _mm512_inserti64x4(_mm512_castsi256_si512(hn::DemoteTo(du16, low).raw),
                                             hn::DemoteTo(du16, high).raw, 1));
    }
    return;
  }
#endif
  store_row(from, n, data, dtype, at);
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

/// Eight rows as rows [first, first + 8) of panels [columns / 8, panel_rows, 8], a panel's eight in
/// turn: stores a page apart would share one set of the cache. Whether all values are finite.
HWY_INLINE bool store_eight_in_panels(const RowPointers& rows, std::int64_t columns,
                                      std::int64_t panel_rows, std::int64_t first,
                                      float* HWY_RESTRICT panels) {
  std::int64_t c = 0;
  bool finite = true;
#if HWY_TARGET == HWY_AVX3
  const Sixteen d;
  const hn::RebindToUnsigned<Sixteen> du;
  const auto no_sign = hn::Set(du, 0x7fffffffU);
  auto largest = hn::Zero(du);
  for (; c + 16 <= columns; c += 16) {
    float* to = panels + c * panel_rows + first * 8;
    HWY_UNROLL(4)
    for (std::size_t i = 0; i < 8; i += 2) {
      const auto lower = hn::LoadU(d, rows[i] + c);
      const auto upper = hn::LoadU(d, rows[i + 1] + c);
      largest = hn::Max(largest, hn::And(hn::BitCast(du, lower), no_sign));
      largest = hn::Max(largest, hn::And(hn::BitCast(du, upper), no_sign));
      hn::StoreU(hn::ConcatLowerLower(d, upper, lower), d, to + i * 8);
      hn::StoreU(hn::ConcatUpperUpper(d, upper, lower), d, to + 8 * panel_rows + i * 8);
    }
  }
  finite = hn::AllTrue(du, hn::Lt(largest, hn::Set(du, 0x7f800000U)));
#endif
  for (; c < columns; c += 8) {
    float* to = panels + c * panel_rows + first * 8;
    for (std::size_t i = 0; i < 8; ++i) {
      load_row_f32(rows[i] + c, 8, to + i * 8);
      finite = finite && all_finite(rows[i] + c, 8);
    }
  }
  return finite;
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_PACK_INL
