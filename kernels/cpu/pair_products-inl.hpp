// Rows of bf16 as pairs in the bits of floats: operands of the dot product of vectors.
#if defined(ANNULUS_CPU_PAIR_PRODUCTS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_PAIR_PRODUCTS_INL
#undef ANNULUS_CPU_PAIR_PRODUCTS_INL
#else
#define ANNULUS_CPU_PAIR_PRODUCTS_INL
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/amx_products-inl.hpp"
#include "kernels/cpu/bf16_dots.hpp"
#include "kernels/types.hpp"

#undef ANNULUS_PAIRS
#if HWY_TARGET == HWY_AVX3 && defined(__x86_64__)
#define ANNULUS_PAIRS 1
#else
#define ANNULUS_PAIRS 0
#endif

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Whether products of this type go to the dot product of vectors.
inline bool uses_bf16_dots([[maybe_unused]] DType dtype) {
#if ANNULUS_PAIRS
  return dtype == DType::bf16 && !uses_amx(dtype) && cpu::has_bf16_dots();
#else
  return false;
#endif
}

#if ANNULUS_PAIRS

/// The largest magnitude among bf16 values.
class MagnitudeOfPairs {
 public:
  HWY_INLINE MagnitudeOfPairs() : largest_(_mm512_setzero_si512()) {}

  HWY_INLINE void add(__m512i pairs) {
    largest_ = _mm512_max_epu16(largest_, _mm512_and_si512(pairs, _mm512_set1_epi16(0x7fff)));
  }
  bool finite() const { return _mm512_cmpge_epu16_mask(largest_, _mm512_set1_epi16(0x7f80)) == 0; }

 private:
  __m512i largest_;
};

/// Two rows of `columns` elements as row `row` of panels [columns / 8, rows, 8] of pairs.
inline void pair_rows(const std::uint16_t* lower, const std::uint16_t* upper, std::int64_t columns,
                      std::int64_t rows, std::int64_t row, float* panels,
                      MagnitudeOfPairs& magnitude) {
  float* to = panels + row * 8;
  std::int64_t c = 0;
  for (; c + 32 <= columns; c += 32) {
    const __m512i low = _mm512_loadu_si512(lower + c);
    const __m512i high = _mm512_loadu_si512(upper + c);
    magnitude.add(low);
    magnitude.add(high);
    const __m512i first = _mm512_unpacklo_epi16(low, high);  // of a panel's columns four, and four
    const __m512i second = _mm512_unpackhi_epi16(low, high);
    const __m512i index[2] = {_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                              _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15)};
    HWY_UNROLL(2)
    for (int half = 0; half < 2; ++half) {
      const __m512i pairs = _mm512_permutex2var_epi64(first, index[half], second);
      float* at = to + (c + 16 * half) * rows;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(pairs));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 8 * rows),
                          _mm512_extracti64x4_epi64(pairs, 1));
    }
  }
  for (; c < columns; c += 8) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lower + c));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(upper + c));
    const __m256i pairs = _mm256_or_si256(_mm256_cvtepu16_epi32(low),
                                          _mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16));
    magnitude.add(_mm512_zextsi256_si512(pairs));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c * rows), pairs);
  }
}

/// −x for pairs, a multiple of 16 of them.
inline void flip_signs(std::int64_t count, float* pairs) {
  const __m512i signs = _mm512_set1_epi32(static_cast<int>(0x80008000U));
  for (std::int64_t i = 0; i < count; i += 16) {
    _mm512_storeu_si512(pairs + i, _mm512_xor_si512(signs, _mm512_loadu_si512(pairs + i)));
  }
}

#endif  // ANNULUS_PAIRS

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_PAIR_PRODUCTS_INL
