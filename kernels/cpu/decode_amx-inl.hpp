// The two products of decode attention for a few queries on the tile unit, and how K and V reach
// it: Sᵀ = K·Qᵀ takes rows of K as they are, O = P·V pairs of rows of V.
#if defined(ANNULUS_CPU_DECODE_AMX_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DECODE_AMX_INL
#undef ANNULUS_CPU_DECODE_AMX_INL
#else
#define ANNULUS_CPU_DECODE_AMX_INL
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/amx_tile-inl.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/row_prefetch.hpp"

#if ANNULUS_AMX
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Keys of a tile.
inline constexpr std::int64_t kTileKeys = 64;

// Lines of the next tile to ask for at each step of this one, about as its time is spent: asked for
// in one go they would hold every line buffer that the tile itself needs. 512 lines in all where K
// and V have 128 columns.
inline constexpr int kLinesOfPair = 8;     // of rows of V made a pair
inline constexpr int kLinesOfScores = 16;  // 32 columns of K
inline constexpr int kLinesOfValues = 32;  // 32 columns of V
inline constexpr int kLinesOfRow = 16;     // a row of weights

/// bf16 rows of one head's keys or values, `stride` elements apart.
struct HalfRows {
  const std::uint16_t* data = nullptr;
  std::int64_t stride = 0;
  std::int64_t count = 0;
  std::int64_t dim = 0;
};

inline std::int64_t amx_depth(std::int64_t dim) { return round_up(dim, kAmxDepth); }

inline __mmask32 columns_left(std::int64_t left) {
  return left >= kAmxDepth ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
}

/// to[count, dim rounded up], zeros beyond dim.
inline void copy_half_rows(const HalfRows& rows, std::uint16_t* to) {
  const std::int64_t depth = amx_depth(rows.dim);
  for (std::int64_t i = 0; i < rows.count; ++i) {
    for (std::int64_t d = 0; d < depth; d += kAmxDepth) {
      _mm512_store_si512(
          to + i * depth + d,
          _mm512_maskz_loadu_epi16(columns_left(rows.dim - d), rows.data + i * rows.stride + d));
    }
  }
}

/// V as right operands, [keys / 2, columns] pairs of rows up to a multiple of 32 keys: of each 32
/// columns, the lower halves of the four quarters come first. False when some value is not finite.
inline bool pack_value_pairs(const HalfRows& v, std::uint32_t* pairs, RowPrefetch& prefetch) {
  const std::int64_t depth = amx_depth(v.dim);
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t key = 0; key < round_up(v.count, kAmxDepth); key += 2) {
    prefetch.lines<kLinesOfPair>();
    const std::uint16_t* row = v.data + key * v.stride;
    for (std::int64_t d = 0; d < depth; d += kAmxDepth) {
      const __mmask32 columns = columns_left(v.dim - d);
      const __m512i even = _mm512_maskz_loadu_epi16(key < v.count ? columns : 0, row + d);
      const __m512i odd =
          _mm512_maskz_loadu_epi16(key + 1 < v.count ? columns : 0, row + v.stride + d);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(even, magnitude));
      largest = _mm512_max_epu16(largest, _mm512_and_si512(odd, magnitude));
      std::uint32_t* at = pairs + key / 2 * depth + d;
      _mm512_store_si512(at, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(at + kAmxColumns, _mm512_unpackhi_epi16(even, odd));
    }
  }
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
}

/// Query r as column r of right operands, [dim / 32, 16 pairs, 16 columns].
/// @pre tiles are zero
inline void pack_query_column(const std::uint16_t* q, std::int64_t dim, std::int64_t r,
                              std::uint32_t* tiles) {
  for (std::int64_t pair = 0; pair < dim / 2; ++pair) {
    std::memcpy(tiles + pair * kAmxColumns + r, q + 2 * pair, sizeof(std::uint32_t));
  }
}

/// products[key, column] = k·q for 64 keys, whose rows have a multiple of 32 elements.
inline void amx_scores(const std::uint16_t* k, std::int64_t stride, std::int64_t depth,
                       const std::uint32_t* q, float* products, RowPrefetch& prefetch) {
  const std::int64_t tile = kAmxRows * stride;
  amx_zero<0>();
  amx_zero<1>();
  amx_zero<2>();
  amx_zero<3>();
  for (std::int64_t d = 0; d < depth; d += kAmxDepth) {
    prefetch.lines<kLinesOfScores>();
    amx_load<7>(q + d / 2 * kAmxColumns, 64);
    amx_load<4>(k + d, 2 * stride);
    amx_load<5>(k + d + tile, 2 * stride);
    amx_multiply<0, 4, 7>();
    amx_multiply<1, 5, 7>();
    amx_load<4>(k + d + 2 * tile, 2 * stride);
    amx_load<5>(k + d + 3 * tile, 2 * stride);
    amx_multiply<2, 4, 7>();
    amx_multiply<3, 5, 7>();
  }
  amx_store<0>(products, 64);
  amx_store<1>(products + 256, 64);
  amx_store<2>(products + 512, 64);
  amx_store<3>(products + 768, 64);
}

/// Weights as left operands in two parts, p = high + low up to 2^−17 of p, in rows 0–7 and 8–15:
/// what one bf16 leaves out would be seen in an f32 output.
struct WeightTiles {
  std::uint16_t rows[kTileKeys / kAmxDepth][kAmxRows][kAmxDepth];
};

// p in bf16, as bits in the upper half.
HWY_INLINE __m512i round_to_half(__m512 p) {
  return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_set1_epi32(0x8000)),
                          _mm512_set1_epi32(static_cast<int>(0xffff0000U)));
}

HWY_INLINE __m512i upper_halves(__m512i first, __m512i second) {
  const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(first, 16));
  const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(second, 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/// Row r of at most 8, p[kTileKeys].
inline void pack_weights(const float* p, std::int64_t r, WeightTiles& tiles) {
  for (std::int64_t step = 0; step < kTileKeys / kAmxDepth; ++step) {
    const __m512 first = _mm512_loadu_ps(p + step * kAmxDepth);
    const __m512 second = _mm512_loadu_ps(p + step * kAmxDepth + kAmxColumns);
    const __m512i first_high = round_to_half(first);
    const __m512i second_high = round_to_half(second);
    _mm512_storeu_si512(tiles.rows[step][r], upper_halves(first_high, second_high));
    const __m512 first_rest = _mm512_sub_ps(first, _mm512_castsi512_ps(first_high));
    const __m512 second_rest = _mm512_sub_ps(second, _mm512_castsi512_ps(second_high));
    _mm512_storeu_si512(tiles.rows[step][r + 8],
                        upper_halves(round_to_half(first_rest), round_to_half(second_rest)));
  }
}

/// o[row] ← o[row]·rescale[row] + p·V for up to 64 keys; rows are `columns`
/// apart (a multiple of 16).
inline void amx_add_values(const WeightTiles& p, const std::uint32_t* pairs, std::int64_t keys,
                           std::int64_t dim, const float* rescale, std::int64_t rows,
                           std::int64_t columns, float* o, RowPrefetch& prefetch) {
  static_assert(kTileKeys == 2 * kAmxDepth);
  const std::int64_t depth = amx_depth(dim);
  HWY_ALIGN float sums[2][kAmxRows * kAmxColumns];
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  amx_load<4>(p.rows[0], 64);
  amx_load<5>(p.rows[1], 64);
  for (std::int64_t d = 0; d < depth; d += kAmxDepth) {
    prefetch.lines<kLinesOfValues>();
    const std::uint32_t* at = pairs + d;
    amx_zero<0>();
    amx_zero<1>();
    amx_load<6>(at, 4 * depth);
    amx_load<7>(at + kAmxColumns, 4 * depth);
    amx_multiply<0, 4, 6>();
    amx_multiply<1, 4, 7>();
    if (keys > kAmxDepth) {
      amx_load<6>(at + kAmxRows * depth, 4 * depth);
      amx_load<7>(at + kAmxRows * depth + kAmxColumns, 4 * depth);
      amx_multiply<0, 5, 6>();
      amx_multiply<1, 5, 7>();
    }
    amx_store<0>(sums[0], 64);
    amx_store<1>(sums[1], 64);
    for (std::int64_t r = 0; r < rows; ++r) {
      const __m512 low = _mm512_add_ps(_mm512_load_ps(sums[0] + r * kAmxColumns),
                                       _mm512_load_ps(sums[0] + (r + 8) * kAmxColumns));
      const __m512 high = _mm512_add_ps(_mm512_load_ps(sums[1] + r * kAmxColumns),
                                        _mm512_load_ps(sums[1] + (r + 8) * kAmxColumns));
      const __m512 factor = _mm512_set1_ps(rescale[r]);
      float* to = o + r * columns + d;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(factor, _mm512_loadu_ps(to),
                                           _mm512_permutex2var_ps(low, first, high)));
      if (d + kAmxColumns >= columns) continue;
      to += kAmxColumns;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(factor, _mm512_loadu_ps(to),
                                           _mm512_permutex2var_ps(low, second, high)));
    }
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_AMX

#endif  // ANNULUS_CPU_DECODE_AMX_INL
