#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/sm90/forward_tile.cuh"

/// Online softmax over a warpgroup's accumulator fragments (Milakov & Gimelshein, 2018). A thread
/// holds rows lane/4 and lane/4 + 8 of its warp's sixteen: element i lies in row (i / 2) % 2 and
/// column i / 4 * 8 + lane % 4 * 2 + i % 2.
namespace annulus::kernels::sm90 {

inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// tanh by two special-function calls; its absolute error stays near 1e-7, which tanh.approx
/// (2^-11) would multiply by the cap.
__device__ inline float tanh_exp(float x) {
  return 1.0F - __fdividef(2.0F, exp2_approx(2.0F * kLog2E * x) + 1.0F);
}

template <typename Element>
__device__ inline std::uint32_t pack_pair(float low, float high);

template <>
__device__ inline std::uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ inline std::uint32_t pack_pair<__half>(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

/// The maximum in use, in raw scores (the true one may be larger by the headroom), and the row sum
/// of this thread's columns alone.
struct RowStatistics {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0F, 0.0F};
};

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 1);
  return x + __shfl_xor_sync(0xffffffffU, x, 2);
}

/// Columns [begin, begin + count) of the block that a row may see.
struct RowWindow {
  int begin = 0;
  unsigned count = 0;
};

__device__ inline RowWindow row_window(const BlockNote& note, int q) {
  if (q < note.q_begin || q >= note.q_end) return {};
  const int begin = max(note.k_first, q + note.lo) - note.k_begin;
  const int end = min(note.k_end, q + note.hi + 1) - note.k_begin;
  return {begin, static_cast<unsigned>(max(end - begin, 0))};
}

/// How many of a thread's elements of a row lie left of a column.
__device__ inline int elements_before(int column) {
  const int x = column - static_cast<int>(threadIdx.x % 4) * 2;
  return (x >> 3) * 2 + min(x & 7, 2);
}

/// Bits [begin, end) of 32, bounds outside of which count as 0 or 32.
__device__ inline unsigned bits_between(int begin, int end) {
  const int first = max(begin, 0);
  unsigned bits;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(bits) : "r"(first), "r"(max(end - first, 0)));
  return bits;
}

/// By a comparison for each element.
template <int kCount>
__device__ inline void mask_columns(float (&s)[kCount], const RowWindow (&windows)[2]) {
  const int column = static_cast<int>(threadIdx.x % 4) * 2;
  const int shift[2] = {column - windows[0].begin, column - windows[1].begin};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = (i / 2) % 2;
    const unsigned offset = static_cast<unsigned>(i / 4 * 8 + i % 2 + shift[row]);
    if (offset >= windows[row].count) s[i] = -INFINITY;
  }
}

/// By a bit for each element, which costs the forward kernel less than a comparison each.
template <int kCount>
__device__ inline void mask_scores(float (&s)[kCount], const RowWindow (&windows)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int begin = elements_before(windows[row].begin);
    const int end = elements_before(windows[row].begin + static_cast<int>(windows[row].count));
#pragma unroll
    for (int base = 0; base < kCount / 2; base += 32) {
      const unsigned kept = bits_between(begin - base, end - base);
#pragma unroll
      for (int i = base; i < min(base + 32, kCount / 2); ++i) {
        if ((kept >> (i - base) & 1U) == 0) s[i / 2 * 4 + 2 * row + i % 2] = -INFINITY;
      }
    }
  }
}

/// How far scores may grow over the maximum in use before it is renewed, in powers of two: P then
/// reaches 2^8, which every 16-bit type and the fp32 sums hold without loss.
inline constexpr float kHeadroom = 8.0F;

/// Maxima of the block alone, over a quad's columns.
template <int kCount>
__device__ inline void block_maxima(const float (&s)[kCount], float (&block_max)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    // Two chains a row hide the latency of a dependent maximum.
    float even = s[2 * row], odd = s[2 * row + 1];
#pragma unroll
    for (int i = 4; i < kCount; i += 4) {
      even = fmaxf(even, s[i + 2 * row]);
      odd = fmaxf(odd, s[i + 2 * row + 1]);
    }
    block_max[row] = quad_max(fmaxf(even, odd));
  }
}

/// An upper bound of the same, at the price of half the instructions: bits compare like the numbers
/// they stand for as long as one of them is not negative. Negative maxima are bounded by 0.
template <int kCount>
__device__ inline void bound_maxima(const float (&s)[kCount], float (&bound)[2], bool& exact) {
  int most = 0x7FFFFFFF;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    int first = __float_as_int(s[2 * row]), second = __float_as_int(s[2 * row + 1]);
#pragma unroll
    for (int i = 4; i < kCount; i += 8) {
      first =
          __vimax3_s32(first, __float_as_int(s[i + 2 * row]), __float_as_int(s[i + 2 * row + 1]));
      if (i + 4 < kCount) {
        second = __vimax3_s32(second, __float_as_int(s[i + 4 + 2 * row]),
                              __float_as_int(s[i + 4 + 2 * row + 1]));
      }
    }
    int bits = max(first, second);
    bits = max(bits, __shfl_xor_sync(0xffffffffU, bits, 1));
    bits = max(bits, __shfl_xor_sync(0xffffffffU, bits, 2));
    bound[row] = __int_as_float(max(bits, 0));
    most = min(most, bits);
  }
  exact = most >= 0;
}

/// Renews the maxima in use where the scores outgrow them by more than the headroom. Returns
/// whether some row of the warp did: `factor` then holds what earlier sums of O must be multiplied
/// by. With headroom that is rare after a tile's first blocks, and the multiplications of O are
/// saved.
template <int kCount>
__device__ inline bool renew_maxima(const float (&s)[kCount], RowStatistics& rows, float exp_scale,
                                    float headroom, float (&factor)[2]) {
  float block_max[2];
  bool exact;
  bound_maxima(s, block_max, exact);
  const bool grown = block_max[0] > rows.max[0] + headroom || block_max[1] > rows.max[1] + headroom;
  const bool renewed = __any_sync(0xffffffffU, grown);
  if (renewed) [[unlikely]] {
    if (!__all_sync(0xffffffffU, exact)) block_maxima(s, block_max);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float now = fmaxf(rows.max[row], block_max[row]);
      const float base = now == -INFINITY ? 0.0F : now;
      factor[row] = exp2_approx((rows.max[row] - base) * exp_scale);
      rows.max[row] = now;
      rows.sum[row] *= factor[row];
    }
  }
  return renewed;
}

/// Turns scores into exp2(exp_scale·(s − max)) and adds them up.
template <int kCount>
__device__ inline void exponentials(float (&s)[kCount], const RowStatistics& rows, float exp_scale,
                                    float (&sum)[2]) {
  float scaled_max[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    scaled_max[row] = rows.max[row] == -INFINITY ? 0.0F : rows.max[row] * exp_scale;
  }
  float even[2], odd[2];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = (i / 2) % 2;
    s[i] = exp2_approx(fmaf(s[i], exp_scale, -scaled_max[row]));
    float& part = i % 2 == 0 ? even[row] : odd[row];
    part = i < 4 ? s[i] : part + s[i];
  }
  sum[0] = even[0] + odd[0];
  sum[1] = even[1] + odd[1];
}

/// Both, with the sums added to the rows'.
template <int kCount>
__device__ inline bool softmax_step(float (&s)[kCount], RowStatistics& rows, float exp_scale,
                                    float headroom, float (&factor)[2]) {
  const bool renewed = renew_maxima(s, rows, exp_scale, headroom, factor);
  float sum[2];
  exponentials(s, rows, exp_scale, sum);
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
  return renewed;
}

/// Whether sums of a block's exponentials show that none was too large for P's type: what makes it
/// safe not to look at the block's maxima beforehand. No number is too large.
template <typename Element>
__device__ inline bool in_range(const float (&sum)[2]) {
  constexpr float kLargest = std::is_same_v<Element, __half> ? 0x1p15F : 0x1p60F;
  return sum[0] <= kLargest && sum[1] <= kLargest;
}

/// Accumulator layout to the layout of wgmma's A operand: a re-pairing inside each thread.
template <typename Element, int kCount>
__device__ inline void pack_probabilities(const float (&s)[kCount],
                                          std::uint32_t (&p)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) p[i] = pack_pair<Element>(s[2 * i], s[2 * i + 1]);
}

template <int kCount>
__device__ inline void scale_rows(float (&o)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor[(i / 2) % 2];
}

}  // namespace annulus::kernels::sm90
