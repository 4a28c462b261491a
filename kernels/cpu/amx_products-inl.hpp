// Attention's products of bf16 on the tile unit, in tiles [keys, lanes] like those of
// gemm_tile-inl.hpp: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ, left operands packed a kilobyte a tile.
#if defined(ANNULUS_CPU_AMX_PRODUCTS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_AMX_PRODUCTS_INL
#undef ANNULUS_CPU_AMX_PRODUCTS_INL
#else
#define ANNULUS_CPU_AMX_PRODUCTS_INL
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/amx_tile-inl.hpp"
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/softmax_tile-inl.hpp"

#if ANNULUS_AMX
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

static_assert(kLanes == kAmxColumns && kTileVectors == 3);

// Bytes from row to row of right operands and of C, both [rows, lanes].
inline constexpr std::int64_t kAmxLaneBytes = kTileLanes * 4;

/// Left operands [row tiles, steps, 16 rows, 32 elements], `tile_bytes` from row tile to row tile.
struct AmxLeft {
  const char* data = nullptr;
  std::int64_t tile_bytes = 0;
};

// Of kRows × kColumns tiles of C six fit beside one of each operand.
template <int kRow, int kColumns>
HWY_INLINE void amx_block_row(const char* a, const char* b) {
  amx_load<6>(a, 64);
  amx_load<7>(b, kAmxLaneBytes);
  amx_multiply<kRow * kColumns, 6, 7>();
  if constexpr (kColumns > 1) {
    amx_load<7>(b + 64, kAmxLaneBytes);
    amx_multiply<kRow * kColumns + 1, 6, 7>();
  }
  if constexpr (kColumns > 2) {
    amx_load<7>(b + 128, kAmxLaneBytes);
    amx_multiply<kRow * kColumns + 2, 6, 7>();
  }
}

template <int kRow, int kColumns>
HWY_INLINE void amx_zero_row() {
  amx_zero<kRow * kColumns>();
  if constexpr (kColumns > 1) amx_zero<kRow * kColumns + 1>();
  if constexpr (kColumns > 2) amx_zero<kRow * kColumns + 2>();
}

template <int kRow, int kColumns>
HWY_INLINE void amx_store_row(float* c) {
  amx_store<kRow * kColumns>(c, kAmxLaneBytes);
  if constexpr (kColumns > 1) amx_store<kRow * kColumns + 1>(c + 16, kAmxLaneBytes);
  if constexpr (kColumns > 2) amx_store<kRow * kColumns + 2>(c + 32, kAmxLaneBytes);
}

/// C[16·kRows, 16·kColumns] = A·B over `steps` of 32.
template <int kRows, int kColumns>
HWY_INLINE void amx_block(std::int64_t steps, const AmxLeft& a, const void* b, float* c) {
  const char* left = a.data;
  const char* right = static_cast<const char*>(b);
  amx_zero_row<0, kColumns>();
  if constexpr (kRows > 1) amx_zero_row<1, kColumns>();
  for (std::int64_t step = 0; step < steps; ++step) {
    amx_block_row<0, kColumns>(left, right);
    if constexpr (kRows > 1) amx_block_row<1, kColumns>(left + a.tile_bytes, right);
    left += kAmxBytes;
    right += kAmxRows * kAmxLaneBytes;
  }
  amx_store_row<0, kColumns>(c);
  if constexpr (kRows > 1) amx_store_row<1, kColumns>(c + kAmxRows * kTileLanes);
}

/// Up to two row tiles of C.
inline void amx_product(std::int64_t row_tiles, std::int64_t vectors, std::int64_t steps,
                        const AmxLeft& a, const void* b, float* c) {
  const auto block = vectors == 3   ? (row_tiles == 2 ? amx_block<2, 3> : amx_block<1, 3>)
                     : vectors == 2 ? (row_tiles == 2 ? amx_block<2, 2> : amx_block<1, 2>)
                                    : (row_tiles == 2 ? amx_block<2, 1> : amx_block<1, 1>);
  block(steps, a, b, c);
}

/// A row of `dim` bf16 elements with zeros up to a multiple of 32.
inline void copy_half_row(const std::uint16_t* from, std::int64_t dim, std::uint16_t* to) {
  std::copy_n(from, dim, to);
  std::fill(to + dim, to + round_up(dim, kAmxDepth), std::uint16_t{0});
}

/// Row `row` of left operands, from a row of dim elements rounded up to 32.
inline void store_left_row(const std::uint16_t* from, std::int64_t dim, std::int64_t row,
                           char* left) {
  const std::int64_t steps = round_up(dim, kAmxDepth) / kAmxDepth;
  char* to = left + row / kAmxRows * steps * kAmxBytes + row % kAmxRows * 64;
  for (std::int64_t step = 0; step < steps; ++step) {
    _mm512_store_si512(to + step * kAmxBytes, _mm512_loadu_si512(from + step * kAmxDepth));
  }
}

/// 32 rows of dim elements each (rounded up to 32, `stride` apart) as the columns of one step of
/// left operands [dim / 16, steps, 16, 32]; `pairs` has room for 16 rows of them. Returns the
/// largest magnitude in each lane.
inline __m512i store_left_columns(const std::uint16_t* from, std::int64_t stride, std::int64_t dim,
                                  std::int64_t steps, float* pairs, char* left) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  const std::int64_t depth = round_up(dim, kAmxDepth);
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t pair = 0; pair < kAmxRows; ++pair) {
    for (std::int64_t d = 0; d < depth; d += kAmxDepth) {
      const __m512i even = _mm512_loadu_si512(from + 2 * pair * stride + d);
      const __m512i odd = _mm512_loadu_si512(from + (2 * pair + 1) * stride + d);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(even, magnitude));
      largest = _mm512_max_epu16(largest, _mm512_and_si512(odd, magnitude));
      const __m512i low = _mm512_unpacklo_epi16(even, odd);
      const __m512i high = _mm512_unpackhi_epi16(even, odd);
      float* to = pairs + pair * depth + d;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi32(low, first, high));
      _mm512_storeu_si512(to + kAmxColumns, _mm512_permutex2var_epi32(low, second, high));
    }
  }
  for (std::int64_t d = 0; d < dim; d += kAmxRows) {
    transpose(pairs + d, depth, kAmxRows, kAmxRows,
              reinterpret_cast<float*>(left + d / kAmxRows * steps * kAmxBytes), kAmxColumns);
  }
  return largest;
}

/// Whether magnitudes of bf16 values are all finite.
inline bool halves_finite(__m512i largest) {
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
}

// Two rows of f32 as pairs of bf16, rounded; lower halves first.
HWY_INLINE __m512i pair_of(__m512 lower, __m512 upper) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_add_epi32(_mm512_castps_si512(lower), half);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(upper), half);
  return _mm512_mask_blend_epi16(0xaaaaaaaaU, _mm512_srli_epi32(low, 16), high);
}

HWY_INLINE __m512i halves_of(__m512 first, __m512 second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_add_epi32(_mm512_castps_si512(first), half);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(second), half);
  const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(low, 16));
  const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

/// f32 rows [keys, lanes] as left operands [keys / 16, 2 steps, 16, 32 lanes], rounded; lanes
/// beyond `vectors` are 0.
inline void store_left_lanes(std::int64_t keys, std::int64_t vectors, const float* rows,
                             char* left) {
  const __m512 zero = _mm512_setzero_ps();
  for (std::int64_t key = 0; key < keys; ++key) {
    const float* row = rows + key * kTileLanes;
    char* to = left + key / kAmxRows * 2 * kAmxBytes + key % kAmxRows * 64;
    const __m512 second = vectors > 1 ? _mm512_load_ps(row + kLanes) : zero;
    const __m512 third = vectors > 2 ? _mm512_load_ps(row + 2 * kLanes) : zero;
    _mm512_store_si512(to, halves_of(_mm512_load_ps(row), second));
    _mm512_store_si512(to + kAmxBytes, halves_of(third, zero));
  }
}

/// Columns of a group of right operands, and 32-bit words of one: 64 rows in pairs.
inline constexpr std::int64_t kRightWords = 32 * kTileLanes;

/// f32 rows that hold bf16 values, `stride` apart, as right operands of a product over rows:
/// [columns / 48, 32 pairs, 48], zeros beyond `count`.
inline void store_right_rows(const float* rows, std::int64_t stride, std::int64_t count,
                             std::int64_t columns, std::uint32_t* right) {
  const __m512 zero = _mm512_setzero_ps();
  for (std::int64_t pair = 0; pair < 32; ++pair) {
    const float* row = rows + 2 * pair * stride;
    for (std::int64_t column = 0; column < columns; column += kLanes) {
      const __m512 lower = 2 * pair < count ? _mm512_loadu_ps(row + column) : zero;
      const __m512 upper = 2 * pair + 1 < count ? _mm512_loadu_ps(row + stride + column) : zero;
      _mm512_store_si512(
          right + column / kTileLanes * kRightWords + pair * kTileLanes + column % kTileLanes,
          pair_of(lower, upper));
    }
  }
}

/// f32 rows [lanes, columns] that hold bf16 values as right operands of a product over columns,
/// [columns / 2, lanes]; `halves` has room for the rows as bf16, `columns` a multiple of 32.
inline void store_right_columns(const float* rows, std::int64_t stride, std::int64_t columns,
                                std::int64_t used, std::uint32_t sign, float* halves,
                                float* right) {
  const __m512i flip = _mm512_set1_epi32(static_cast<int>(sign));
  for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
    for (std::int64_t d = 0; d < columns; d += kAmxDepth) {
      const float* at = rows + lane * stride + d;
      const __mmask16 low =
          used - d >= 16 ? 0xffff : static_cast<__mmask16>((1U << (used - d)) - 1);
      const std::int64_t rest = used - d - 16;
      const __mmask16 high = rest >= 16  ? 0xffff
                             : rest <= 0 ? 0
                                         : static_cast<__mmask16>((1U << rest) - 1);
      const __m512 first = _mm512_maskz_loadu_ps(low, at);
      const __m512 second = _mm512_maskz_loadu_ps(high, at + 16);
      const auto flipped = [&](__m512 x) HWY_ATTR {
        return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), flip));
      };
      _mm512_storeu_si512(halves + lane * (columns / 2) + d / 2,
                          halves_of(flipped(first), flipped(second)));
    }
  }
  transpose(halves, columns / 2, kTileLanes, columns / 2, right, kTileLanes);
}

/// Weights [keys, lanes] as right operands [keys / 2, lanes].
inline void store_pairs(std::int64_t keys, std::int64_t vectors, const float* p,
                        std::uint32_t* pairs) {
  for (std::int64_t key = 0; key < keys; key += 2) {
    for (std::int64_t v = 0; v < vectors; ++v) {
      const float* at = p + key * kTileLanes + v * kLanes;
      _mm512_store_si512(pairs + key / 2 * kTileLanes + v * kLanes,
                         pair_of(_mm512_load_ps(at), _mm512_load_ps(at + kTileLanes)));
    }
  }
}

// 2^x for x ≤ 0 with a relative error of 1.1e-7 before roundings (minimax with 2^0 = 1): weights
// lose more as bf16, and their sum keeps to f32. The argument's reduction is one instruction.
HWY_INLINE __m512 exp2_of_weight(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT);
  __m512 p = _mm512_set1_ps(0x1.5bba14p-10F);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3cea88p-7F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c6b752p-5F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebf9bcp-3F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42ap-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0F));
  return _mm512_scalef_ps(p, _mm512_sub_ps(x, f));
}

template <int kVectors>
HWY_NOINLINE void softmax_pairs_vectors(std::int64_t keys, float scale, const float* s,
                                        const LaneState& state, float* rescale,
                                        std::uint32_t* pairs) {
  const __m512 log2e = _mm512_set1_ps(kLog2E);
  __m512 before[kVectors];
  __m512 max[kVectors];
  __m512 sum[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    before[v] = _mm512_mul_ps(_mm512_load_ps(state.max + v * kLanes), log2e);
  }
  raise_max<kVectors>(keys, scale, s, state.max);
  for (int v = 0; v < kVectors; ++v) {
    max[v] = base2_max(FloatVec{_mm512_load_ps(state.max + v * kLanes)}).raw;
    _mm512_store_ps(rescale + v * kLanes, exp2_of_weight(_mm512_sub_ps(before[v], max[v])));
    sum[v] = _mm512_setzero_ps();
  }
  const __m512 to_base2 = _mm512_set1_ps(scale * kLog2E);
  for (std::int64_t key = 0; key < keys; key += 2) {
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) {
      const float* at = s + key * kTileLanes + v * kLanes;
      const __m512 lower = exp2_of_weight(_mm512_fmsub_ps(_mm512_load_ps(at), to_base2, max[v]));
      const __m512 upper =
          exp2_of_weight(_mm512_fmsub_ps(_mm512_load_ps(at + kTileLanes), to_base2, max[v]));
      sum[v] = _mm512_add_ps(sum[v], _mm512_add_ps(lower, upper));
      _mm512_store_si512(pairs + key / 2 * kTileLanes + v * kLanes, pair_of(lower, upper));
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    float* running = state.sum + v * kLanes;
    _mm512_store_ps(running, _mm512_fmadd_ps(_mm512_load_ps(running),
                                             _mm512_load_ps(rescale + v * kLanes), sum[v]));
  }
}

/// As softmax_tile for an even number of keys, with the weights as pairs of bf16.
inline void softmax_pairs(std::int64_t keys, std::int64_t vectors, float scale, const float* s,
                          const LaneState& state, float* rescale, std::uint32_t* pairs) {
  const auto softmax = vectors == 3   ? softmax_pairs_vectors<3>
                       : vectors == 2 ? softmax_pairs_vectors<2>
                                      : softmax_pairs_vectors<1>;
  softmax(keys, scale, s, state, rescale, pairs);
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_AMX

#endif  // ANNULUS_CPU_AMX_PRODUCTS_INL
