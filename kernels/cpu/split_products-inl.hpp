// Products of f32 on the tile unit. A number is the sum of three of bf16, exactly: of its 24 bits
// each part has eight. Of the nine products of parts six matter; the others are below 2^-24 of the
// whole. (The idea of cuBLAS's BF16x9 and of oneDNN's bf16x3; here the small products are summed
// first, so that a sum is rounded no more often than by multiply-adds of f32.)
#if defined(ANNULUS_CPU_SPLIT_PRODUCTS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_SPLIT_PRODUCTS_INL
#undef ANNULUS_CPU_SPLIT_PRODUCTS_INL
#else
#define ANNULUS_CPU_SPLIT_PRODUCTS_INL
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/amx_products-inl.hpp"
#include "kernels/cpu/amx_tile-inl.hpp"

#if ANNULUS_AMX
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// High, middle and low part lie side by side for each step of 32.
inline constexpr std::int64_t kSplitStepBytes = 3 * kAmxBytes;
/// Lanes of a tile of queries: two tile registers wide. Four accumulators hide the latency of a
/// product and leave two registers for each operand, so that 24 products need 16 loads.
inline constexpr std::int64_t kSplitLanes = 2 * kAmxColumns;

/// Operands [tiles, steps, 3 parts, 1 KB]: row tiles of 16 rows on the left, of 16 columns in pairs
/// on the right.
struct SplitOperand {
  const char* data = nullptr;
  std::int64_t tile_bytes = 0;
};

template <int kRows, int kPart>
HWY_INLINE void split_load_left(const char* step, std::int64_t tile_bytes) {
  amx_stream<4>(step + kPart * kAmxBytes, 64);
  if constexpr (kRows > 1) amx_stream<5>(step + tile_bytes + kPart * kAmxBytes, 64);
}

template <int kColumns, int kPart>
HWY_INLINE void split_load_right(const char* step, std::int64_t tile_bytes) {
  amx_load<6>(step + kPart * kAmxBytes, 64);
  if constexpr (kColumns > 1) amx_load<7>(step + tile_bytes + kPart * kAmxBytes, 64);
}

template <int kRows, int kColumns>
HWY_INLINE void split_multiply() {
  amx_multiply<0, 4, 6>();
  if constexpr (kColumns > 1) amx_multiply<1, 4, 7>();
  if constexpr (kRows > 1) amx_multiply<2, 5, 6>();
  if constexpr (kRows > 1 && kColumns > 1) amx_multiply<3, 5, 7>();
}

template <int kRows, int kColumns, typename Between>
HWY_INLINE void split_small_step(const char* a, std::int64_t a_tile, const char* b,
                                 std::int64_t b_tile, Between& between) {
  split_load_left<kRows, 0>(a, a_tile);
  split_load_right<kColumns, 2>(b, b_tile);
  split_multiply<kRows, kColumns>();
  between();
  split_load_right<kColumns, 1>(b, b_tile);
  split_multiply<kRows, kColumns>();
  between();
  split_load_left<kRows, 1>(a, a_tile);
  split_multiply<kRows, kColumns>();
  between();
  split_load_right<kColumns, 0>(b, b_tile);
  split_multiply<kRows, kColumns>();
  between();
  split_load_left<kRows, 2>(a, a_tile);
  split_multiply<kRows, kColumns>();
  between();
}

/// Vector work that a product does in the shadow of the tile unit: called after every four of its
/// instructions, which take 64 cycles, it should do about as much. Longer pieces fill the window in
/// which the processor looks for instructions to start.
struct NoWork {
  static constexpr std::int64_t kCallsOfStep = 6;
  HWY_INLINE void operator()() {}
};

/// C[16·kRows, 16·kColumns] = A·B over `steps` of 32, `c_stride` floats from row to row.
template <int kRows, int kColumns, typename Between>
HWY_NOINLINE void split_block(std::int64_t steps, const SplitOperand& a, const SplitOperand& b,
                              float* c, std::int64_t c_stride, Between& work) {
  Between between = work;  // a copy whose vectors can stay in registers
  amx_zero<0>();
  if constexpr (kColumns > 1) amx_zero<1>();
  if constexpr (kRows > 1) amx_zero<2>();
  if constexpr (kRows > 1 && kColumns > 1) amx_zero<3>();
  const char* left = a.data;
  const char* right = b.data;
  const char* const end = left + steps * kSplitStepBytes;
  for (; left < end; left += kSplitStepBytes, right += kSplitStepBytes) {
    split_small_step<kRows, kColumns>(left, a.tile_bytes, right, b.tile_bytes, between);
  }
  left = a.data;
  right = b.data;
  for (; left < end; left += kSplitStepBytes, right += kSplitStepBytes) {
    split_load_left<kRows, 0>(left, a.tile_bytes);
    split_load_right<kColumns, 0>(right, b.tile_bytes);
    split_multiply<kRows, kColumns>();
    between();
  }
  const std::int64_t row_bytes = c_stride * 4;
  amx_store<0>(c, row_bytes);
  if constexpr (kColumns > 1) amx_store<1>(c + kAmxColumns, row_bytes);
  float* below = c + kAmxRows * c_stride;
  if constexpr (kRows > 1) amx_store<2>(below, row_bytes);
  if constexpr (kRows > 1 && kColumns > 1) amx_store<3>(below + kAmxColumns, row_bytes);
  work = between;
}

/// Up to two tiles each way. The bits of an element do not depend on what it is computed with.
template <typename Between>
void split_product(std::int64_t rows, std::int64_t columns, std::int64_t steps,
                   const SplitOperand& a, const SplitOperand& b, float* c, std::int64_t c_stride,
                   Between& work) {
  const auto block = rows == 2
                         ? (columns == 2 ? split_block<2, 2, Between> : split_block<2, 1, Between>)
                         : (columns == 2 ? split_block<1, 2, Between> : split_block<1, 1, Between>);
  block(steps, a, b, c, c_stride, work);
}

/// The parts of 16 numbers, each a bf16 in the upper half of an f32.
struct Parts {
  __m512 high, middle, low;
};

/// High and middle are rounded to nearest, which leaves what is dropped without a bias.
HWY_INLINE Parts split(__m512 x) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
  const auto rounded = [&](__m512 value) HWY_ATTR {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(value), half);
    return _mm512_castsi512_ps(_mm512_and_si512(bits, upper));
  };
  const __m512 high = rounded(x);
  const __m512 rest = _mm512_sub_ps(x, high);
  const __m512 middle = rounded(rest);
  return {high, middle, _mm512_sub_ps(rest, middle)};
}

/// Upper halves of two vectors as pairs, `lower` in the lower halves.
HWY_INLINE __m512i upper_pairs(__m512 lower, __m512 upper) {
  return _mm512_mask_blend_epi16(0xaaaaaaaaU, _mm512_srli_epi32(_mm512_castps_si512(lower), 16),
                                 _mm512_castps_si512(upper));
}

/// Upper halves of 32 consecutive numbers.
HWY_INLINE __m512i upper_halves(__m512 first, __m512 second) {
  const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(first), 16));
  const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(second), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

/// Stores the parts of two rows of 16 as pairs, a kilobyte from part to part.
HWY_INLINE void store_split_pairs(__m512 lower, __m512 upper, char* to) {
  const Parts a = split(lower);
  const Parts b = split(upper);
  _mm512_store_si512(to, upper_pairs(a.high, b.high));
  _mm512_store_si512(to + kAmxBytes, upper_pairs(a.middle, b.middle));
  _mm512_store_si512(to + 2 * kAmxBytes, upper_pairs(a.low, b.low));
}

/// Stores the parts of 32 numbers as rows, a kilobyte from part to part.
HWY_INLINE void store_split_halves(__m512 first, __m512 second, char* to) {
  const Parts a = split(first);
  const Parts b = split(second);
  _mm512_store_si512(to, upper_halves(a.high, b.high));
  _mm512_store_si512(to + kAmxBytes, upper_halves(a.middle, b.middle));
  _mm512_store_si512(to + 2 * kAmxBytes, upper_halves(a.low, b.low));
}

/// Whether the parts of n numbers (a multiple of 16) and products of two such numbers are exact
/// and finite: 0, or of a magnitude from 2^-100 to 2^58. Those of anything else would overflow, or
/// lose bits because the tile unit counts denormals as 0.
HWY_INLINE bool splits(const float* x, std::int64_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i one = _mm512_set1_epi32(1);
  __m512i smallest = _mm512_set1_epi32(-1);  // of magnitude − 1: 0 becomes the largest
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < n; i += kAmxColumns) {
    const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude);
    largest = _mm512_max_epu32(largest, bits);
    smallest = _mm512_min_epu32(smallest, _mm512_sub_epi32(bits, one));
  }
  constexpr int kLeast = (127 - 100) << 23;
  constexpr int kMost = (127 + 58) << 23;
  return (_mm512_cmplt_epu32_mask(smallest, _mm512_set1_epi32(kLeast - 1)) |
          _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32(kMost))) == 0;
}

/// Rows of left operands: row `row` from dim elements, a multiple of 32.
inline void store_split_row(const float* from, std::int64_t dim, std::int64_t row, char* left) {
  const std::int64_t steps = dim / kAmxDepth;
  char* to = left + row / kAmxRows * steps * kSplitStepBytes + row % kAmxRows * 64;
  for (std::int64_t step = 0; step < steps; ++step) {
    const float* at = from + step * kAmxDepth;
    store_split_halves(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16), to + step * kSplitStepBytes);
  }
}

/// 16 rows of dim elements (a multiple of 32, `stride` apart) as one tile of right operands of a
/// product over dim: [steps, 3 parts, 16 pairs, 16 rows].
inline void store_split_right(const float* from, std::int64_t stride, std::int64_t dim,
                              char* right) {
  alignas(64) char rows[kSplitStepBytes];
  for (std::int64_t d = 0; d < dim; d += kAmxDepth) {
    for (std::int64_t row = 0; row < kAmxColumns; ++row) {
      const float* at = from + row * stride + d;
      store_split_halves(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16), rows + row * 64);
    }
    for (std::int64_t part = 0; part < 3; ++part) {
      transpose(reinterpret_cast<const float*>(rows + part * kAmxBytes), 16, 16, 16,
                reinterpret_cast<float*>(right + part * kAmxBytes), 16);
    }
    right += kSplitStepBytes;
  }
}

/// 32 rows of dim elements (a multiple of 16, `stride` apart) as the columns of one step of left
/// operands, `tile_bytes` from 16 columns to the next.
inline void store_split_columns(const float* from, std::int64_t stride, std::int64_t dim,
                                std::int64_t tile_bytes, char* left) {
  alignas(64) char pairs[kSplitStepBytes];
  for (std::int64_t d = 0; d < dim; d += kAmxRows) {
    for (std::int64_t pair = 0; pair < kAmxColumns; ++pair) {
      const float* at = from + 2 * pair * stride + d;
      store_split_pairs(_mm512_loadu_ps(at), _mm512_loadu_ps(at + stride), pairs + pair * 64);
    }
    for (std::int64_t part = 0; part < 3; ++part) {
      transpose(reinterpret_cast<const float*>(pairs + part * kAmxBytes), 16, 16, 16,
                reinterpret_cast<float*>(left + part * kAmxBytes), 16);
    }
    left += tile_bytes;
  }
}

/// Weights [keys, lanes] as right operands [vectors, keys / 32, 3 parts, 16 pairs, 16 lanes];
/// `tile_bytes` from vector to vector.
inline void store_split_weights(std::int64_t keys, std::int64_t vectors, const float* p,
                                std::int64_t tile_bytes, char* right) {
  for (std::int64_t key = 0; key < keys; key += 2) {
    char* to = right + key / kAmxDepth * kSplitStepBytes + key % kAmxDepth / 2 * 64;
    for (std::int64_t v = 0; v < vectors; ++v) {
      const float* at = p + key * kTileLanes + v * kLanes;
      store_split_pairs(_mm512_load_ps(at), _mm512_load_ps(at + kTileLanes), to + v * tile_bytes);
    }
  }
}

/// Raises the maxima of a tile [keys, vectors], and rescales the sums for them; `rescale` receives
/// the factor that the accumulator of each lane needs.
template <int kVectors>
void begin_softmax(std::int64_t keys, float scale, const float* s, const LaneState& state,
                   float* rescale) {
  const Floats d;
  FloatVec before[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    before[v] = hn::Mul(hn::Load(d, state.max + v * kLanes), hn::Set(d, kLog2E));
  }
  raise_max<kVectors>(keys, scale, s, state.max);
  for (int v = 0; v < kVectors; ++v) {
    const FloatVec factor =
        exp2(d, hn::Sub(before[v], base2_max(hn::Load(d, state.max + v * kLanes))));
    hn::Store(factor, d, rescale + v * kLanes);
    hn::Store(hn::Mul(hn::Load(d, state.sum + v * kLanes), factor), d, state.sum + v * kLanes);
  }
}

/// The rest of the softmax of a tile [keys, 2 vectors] after begin_softmax, two keys at a time:
/// weights go to right operands as store_split_weights leaves them.
struct WeightWork {
  WeightWork() = default;
  WeightWork(std::int64_t keys, float scale, const float* logits, const LaneState& state,
             std::int64_t vector_bytes, char* weights)
      : s(logits), right(weights), tile_bytes(vector_bytes), pairs(keys / 2) {
    const Floats d;
    to_base2 = hn::Set(d, scale * kLog2E);
    for (int v = 0; v < 2; ++v) {
      max[v] = base2_max(hn::Load(d, state.max + v * kLanes));
      sum[v] = hn::Zero(d);
    }
  }

  HWY_INLINE void operator()() {
    const std::int64_t end = HWY_MIN(done + pairs_of_call, pairs);
    for (; done < end; ++done) add_pair();
  }

  /// What is left, and the sums into the state.
  void finish(const LaneState& state) {
    const Floats d;
    for (; done < pairs; ++done) add_pair();
    for (int v = 0; v < 2; ++v) {
      hn::Store(hn::Add(hn::Load(d, state.sum + v * kLanes), sum[v]), d, state.sum + v * kLanes);
    }
  }

  HWY_INLINE void add_pair() {
    const Floats d;
    const float* at = s + done * 2 * kTileLanes;
    char* to = right + done / 16 * kSplitStepBytes + done % 16 * 64;
    HWY_UNROLL(2)
    for (int v = 0; v < 2; ++v) {
      const FloatVec a = hn::Load(d, at + v * kLanes);
      const FloatVec b = hn::Load(d, at + kTileLanes + v * kLanes);
      const FloatVec lower = exp2(d, hn::MulSub(a, to_base2, max[v]));
      const FloatVec upper = exp2(d, hn::MulSub(b, to_base2, max[v]));
      sum[v] = hn::Add(hn::Add(sum[v], lower), upper);
      store_split_pairs(lower.raw, upper.raw, to + v * tile_bytes);
    }
  }

  const float* s = nullptr;
  char* right = nullptr;
  std::int64_t tile_bytes = 0;
  std::int64_t pairs = 0;
  std::int64_t done = 0;
  std::int64_t pairs_of_call = 1;
  FloatVec to_base2, max[2], sum[2];
};

/// o ← o·rescale + product for rows [rows, 2 vectors], a row at a time.
struct RescaleWork {
  HWY_INLINE void operator()() {
    if (rows == 0) return;
    add_row();
    add_row();
    rows -= 2;
  }

  void finish() {
    for (; rows > 0; --rows) add_row();
  }

  HWY_INLINE void add_row() {
    const Floats d;
    HWY_UNROLL(2)
    for (int v = 0; v < 2; ++v) {
      const FloatVec sum = hn::Load(d, product + v * kLanes);
      hn::Store(hn::MulAdd(hn::Load(d, o + v * kLanes), rescale[v], sum), d, o + v * kLanes);
    }
    o += kTileLanes;
    product += kSplitLanes;
  }

  float* o = nullptr;
  const float* product = nullptr;
  std::int64_t rows = 0;
  FloatVec rescale[2];
};

/// to[row, :] += product[row, :] for rows of one or two vectors, some to a call.
struct AddWork {
  HWY_INLINE void operator()() {
    const std::int64_t count = HWY_MIN(rows, rows_of_call);
    for (std::int64_t i = 0; i < count; ++i) add_row();
    rows -= count;
  }

  void finish() {
    for (; rows > 0; --rows) add_row();
  }

  HWY_INLINE void add_row() {
    const Floats d;
    hn::Store(hn::Add(hn::Load(d, to), hn::Load(d, product)), d, to);
    if (vectors > 1) {
      float* second = to + kLanes;
      hn::Store(hn::Add(hn::Load(d, second), hn::Load(d, product + kLanes)), d, second);
    }
    to += stride;
    product += kSplitLanes;
  }

  float* to = nullptr;
  std::int64_t stride = 0;
  const float* product = nullptr;
  std::int64_t rows = 0;
  std::int64_t vectors = 0;
  std::int64_t rows_of_call = 0;
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_AMX

#endif  // ANNULUS_CPU_SPLIT_PRODUCTS_INL
