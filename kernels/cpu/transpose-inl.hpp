// Transposition of rows: a line of each row at a time where vectors have sixteen lanes, so that
// rows a page apart, which share one set of a cache, are read where they lie.
#if defined(ANNULUS_CPU_TRANSPOSE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_TRANSPOSE_INL
#undef ANNULUS_CPU_TRANSPOSE_INL
#else
#define ANNULUS_CPU_TRANSPOSE_INL
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Rows that are transposed together, wherever they lie.
inline constexpr std::int64_t kRowsTogether = 16;
using RowPointers = std::array<const float*, kRowsTogether>;

#if HWY_TARGET == HWY_AVX3

/// u[j] ← columns j, j + 4, j + 8 and j + 12 of four rows, from `column` on, a block each.
HWY_INLINE void transpose_blocks(const float* const* rows, std::int64_t column, __m512* u) {
  const __m512 r0 = _mm512_loadu_ps(rows[0] + column);
  const __m512 r1 = _mm512_loadu_ps(rows[1] + column);
  const __m512 r2 = _mm512_loadu_ps(rows[2] + column);
  const __m512 r3 = _mm512_loadu_ps(rows[3] + column);
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
  u[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  u[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  u[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  u[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}

/// Sixteen columns of sixteen rows, from `column` on.
HWY_INLINE void transpose_sixteen(const float* const* rows, std::int64_t column,
                                  float* HWY_RESTRICT to, std::int64_t to_stride) {
  __m512 u[16];
  HWY_UNROLL(4)
  for (int i = 0; i < 4; ++i) transpose_blocks(rows + 4 * i, column, u + 4 * i);
  HWY_UNROLL(4)
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
    const __m512 even_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 odd_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    float* at = to + (column + j) * to_stride;
    _mm512_storeu_ps(at, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(at + 4 * to_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(at + 8 * to_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(at + 12 * to_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}

/// Sixteen columns of eight rows, from `column` on, to a panel [columns, 8].
HWY_INLINE void transpose_to_panel(const float* const* rows, std::int64_t column,
                                   float* HWY_RESTRICT panel) {
  __m512 u[8];
  transpose_blocks(rows, column, u);
  transpose_blocks(rows + 4, column, u + 4);
  const auto pairs_of = [&](int j, __m512i index) HWY_ATTR {
    return _mm512_permutex2var_pd(_mm512_castps_pd(u[j]), index, _mm512_castps_pd(u[4 + j]));
  };
  // Blocks 0 and 1, or 2 and 3, of columns j and of those four further on.
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  HWY_UNROLL(2)
  for (int j = 0; j < 4; j += 2) {
    float* at = panel + (column + j) * 8;
    HWY_UNROLL(2)
    for (int half = 0; half < 2; ++half) {
      const __m512d even = pairs_of(j, half == 0 ? low : high);
      const __m512d odd = pairs_of(j + 1, half == 0 ? low : high);
      _mm512_storeu_pd(at + half * 64, _mm512_shuffle_f64x2(even, odd, 0x44));
      _mm512_storeu_pd(at + half * 64 + 32, _mm512_shuffle_f64x2(even, odd, 0xee));
    }
  }
}

#endif  // HWY_AVX3

/// to[c][r] = rows[r][c] for up to kRowsTogether rows; rows and columns are multiples of 4 (or of
/// one lane).
HWY_INLINE void transpose_rows(const RowPointers& rows, std::int64_t count, std::int64_t columns,
                               float* HWY_RESTRICT to, std::int64_t to_stride) {
#if HWY_TARGET == HWY_SCALAR
  for (std::int64_t r = 0; r < count; ++r) {
    const float* row = rows[static_cast<std::size_t>(r)];
    for (std::int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = row[c];
  }
#else
  std::int64_t whole = 0;
#if HWY_TARGET == HWY_AVX3
  if (count == 16) {
    for (; whole + 16 <= columns; whole += 16) {
      transpose_sixteen(rows.data(), whole, to, to_stride);
    }
  } else if (count == 8 && to_stride == 8) {
    for (; whole + 16 <= columns; whole += 16) transpose_to_panel(rows.data(), whole, to);
  }
#endif
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<std::uint64_t, 2> dw;
  for (std::int64_t r = 0; r < count; r += 4) {
    const float* const* row = rows.data() + r;
    for (std::int64_t c = whole; c < columns; c += 4) {
      const auto r0 = hn::LoadU(d, row[0] + c);
      const auto r1 = hn::LoadU(d, row[1] + c);
      const auto r2 = hn::LoadU(d, row[2] + c);
      const auto r3 = hn::LoadU(d, row[3] + c);
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

/// to[c][r] = from[r][c]; rows and columns are multiples of 4 (or of one lane).
HWY_INLINE void transpose(const float* HWY_RESTRICT from, std::int64_t from_stride,
                          std::int64_t rows, std::int64_t columns, float* HWY_RESTRICT to,
                          std::int64_t to_stride) {
  for (std::int64_t first = 0; first < rows; first += kRowsTogether) {
    const std::int64_t count = std::min(kRowsTogether, rows - first);
    RowPointers together{};
    for (std::int64_t i = 0; i < count; ++i) {
      together[static_cast<std::size_t>(i)] = from + (first + i) * from_stride;
    }
    transpose_rows(together, count, columns, to + first, to_stride);
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_TRANSPOSE_INL
