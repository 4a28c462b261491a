// Products of bf16 pairs by the dot product of vectors (AVX512_BF16), of the operands that
// decode_tiles.cpp makes for the tile unit, on processors that have only the former.
#if defined(ANNULUS_CPU_DECODE_DOTS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DECODE_DOTS_INL
#undef ANNULUS_CPU_DECODE_DOTS_INL
#else
#define ANNULUS_CPU_DECODE_DOTS_INL
#endif

#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/amx_tile-inl.hpp"

#if ANNULUS_AMX
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Rows of C at a time: sixteen sums of 16 columns hide the latency of two products a cycle.
inline constexpr int kDotRows = 8;
/// Pairs between two moments to ask for memory.
inline constexpr int kPairsBetween = 4;

/// sum + the products of pairs of a and b. By value: an operand in memory would stay there.
HWY_INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

/// Where a product's operands lie: A in steps of 16 pairs, its rows `row_bytes` and its steps
/// `step_bytes` apart; B as tiles [16 pairs, 16 columns], those of a step a kilobyte after the
/// last.
struct DotOperands {
  const char* a = nullptr;
  std::int64_t row_bytes = 0;
  std::int64_t step_bytes = 0;
  const char* left = nullptr;   // of B's first 16 columns
  const char* right = nullptr;  // of its other 16
};

/// C[8 rows, 32 columns] = A·B, or += where kAdd; rows of C are `stride` floats apart. `ask` is
/// called before every `kPairsBetween` pairs.
template <bool kAdd, typename Ask>
HWY_INLINE void multiply_by_dots(const DotOperands& operands, std::int64_t steps, float* c,
                                 std::int64_t stride, const Ask& ask) {
  __m512 sums[kDotRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kDotRows; ++r) {
    sums[r][0] = kAdd ? _mm512_load_ps(c + r * stride) : _mm512_setzero_ps();
    sums[r][1] = kAdd ? _mm512_load_ps(c + r * stride + kAmxColumns) : _mm512_setzero_ps();
  }
  const std::int64_t row_bytes = operands.row_bytes;
  const std::int64_t fourth = 4 * row_bytes;
  for (std::int64_t step = 0; step < steps; ++step) {
    const char* a = operands.a + step * operands.step_bytes;
    for (std::int64_t at = step * kAmxBytes; at < (step + 1) * kAmxBytes;) {
      ask();
      for (const std::int64_t end = at + 64 * kPairsBetween; at < end; at += 64, a += 4) {
        const __m512i left = _mm512_load_si512(operands.left + at);
        const __m512i right = _mm512_load_si512(operands.right + at);
#pragma GCC unroll 8
        for (int r = 0; r < kDotRows; ++r) {
          std::int32_t pair;
          // Four rows to a base, so that few registers address all.
          const char* base = r < 4 ? a : a + fourth;
          std::memcpy(&pair, base + r % 4 * row_bytes, sizeof(pair));
          const __m512i weight = _mm512_set1_epi32(pair);
          sums[r][0] = add_pairs(sums[r][0], weight, left);
          sums[r][1] = add_pairs(sums[r][1], weight, right);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kDotRows; ++r) {
    _mm512_store_ps(c + r * stride, sums[r][0]);
    _mm512_store_ps(c + r * stride + kAmxColumns, sums[r][1]);
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_AMX

#endif  // ANNULUS_CPU_DECODE_DOTS_INL
