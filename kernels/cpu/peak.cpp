#include "kernels/cpu/peak.hpp"

#include <omp.h>

#include "kernels/cpu/amx.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/peak.cpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"
#include "kernels/cpu/amx_tile-inl.hpp"
#include "kernels/cpu/gemm_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

// Twelve chains cover the latency of two units of four cycles, and fit 16 registers with a and b.
double multiply_adds(std::int64_t rounds) {
  constexpr int kChains = 12;
  const Floats d;
  // x ← x·a + b stays finite, the compiler does not know a and b, and no two chains are alike.
  volatile float opaque[2] = {0.5F, 1.0F};
  const FloatVec a = hn::Set(d, opaque[0]);
  const FloatVec b = hn::Set(d, opaque[1]);
  FloatVec sum[kChains];
  HWY_UNROLL(12)
  for (int i = 0; i < kChains; ++i) sum[i] = hn::Set(d, static_cast<float>(i));
  for (std::int64_t round = 0; round < rounds; ++round) {
    HWY_UNROLL(12)
    for (int i = 0; i < kChains; ++i) sum[i] = hn::MulAdd(sum[i], a, b);
  }
  FloatVec total = hn::Zero(d);
  HWY_UNROLL(12)
  for (int i = 0; i < kChains; ++i) total = hn::Add(total, sum[i]);
  opaque[0] = hn::GetLane(total);
  return 2.0 * static_cast<double>(rounds * kChains * kLanes);
}

float read_all(const float* HWY_RESTRICT data, std::int64_t floats) {
  const Floats d;
  FloatVec sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  for (std::int64_t i = 0; i + 4 * kLanes <= floats; i += 4 * kLanes) {
    HWY_UNROLL(4)
    for (int v = 0; v < 4; ++v) {
      sum[v] = hn::Add(sum[v], hn::LoadU(d, data + i + v * kLanes));
    }
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]))));
}

// Six accumulators cover the latency of a product; 0 where there is no tile unit.
double tile_products([[maybe_unused]] std::int64_t rounds) {
#if ANNULUS_AMX
  if (!cpu::has_amx()) return 0.0;
  const AmxTiles configured;
  amx_zero<0>(), amx_zero<1>(), amx_zero<2>(), amx_zero<3>(), amx_zero<4>(), amx_zero<5>();
  amx_zero<6>(), amx_zero<7>();
  for (std::int64_t round = 0; round < rounds; ++round) {
    amx_multiply<0, 6, 7>();
    amx_multiply<1, 6, 7>();
    amx_multiply<2, 6, 7>();
    amx_multiply<3, 6, 7>();
    amx_multiply<4, 6, 7>();
    amx_multiply<5, 6, 7>();
  }
  return 2.0 * static_cast<double>(rounds * 6 * kAmxRows * kAmxColumns * kAmxDepth);
#else
  return 0.0;
#endif
}

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus::kernels::cpu {
namespace {

#if defined(__x86_64__)
// Highway 1.0 has no target with this instruction.
__attribute__((target("avx512f,avx512bf16"))) double bf16_dots(std::int64_t rounds) {
  __m512 sum0 = _mm512_set1_ps(0.0F), sum1 = _mm512_set1_ps(1.0F), sum2 = _mm512_set1_ps(2.0F),
         sum3 = _mm512_set1_ps(3.0F), sum4 = _mm512_set1_ps(4.0F), sum5 = _mm512_set1_ps(5.0F),
         sum6 = _mm512_set1_ps(6.0F), sum7 = _mm512_set1_ps(7.0F), sum8 = _mm512_set1_ps(8.0F),
         sum9 = _mm512_set1_ps(9.0F), sum10 = _mm512_set1_ps(10.0F), sum11 = _mm512_set1_ps(11.0F);
  volatile int opaque = 0x3f803f80;  // two ones
  const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(opaque));
  for (std::int64_t round = 0; round < rounds; ++round) {
    sum0 = _mm512_dpbf16_ps(sum0, pair, pair);
    sum1 = _mm512_dpbf16_ps(sum1, pair, pair);
    sum2 = _mm512_dpbf16_ps(sum2, pair, pair);
    sum3 = _mm512_dpbf16_ps(sum3, pair, pair);
    sum4 = _mm512_dpbf16_ps(sum4, pair, pair);
    sum5 = _mm512_dpbf16_ps(sum5, pair, pair);
    sum6 = _mm512_dpbf16_ps(sum6, pair, pair);
    sum7 = _mm512_dpbf16_ps(sum7, pair, pair);
    sum8 = _mm512_dpbf16_ps(sum8, pair, pair);
    sum9 = _mm512_dpbf16_ps(sum9, pair, pair);
    sum10 = _mm512_dpbf16_ps(sum10, pair, pair);
    sum11 = _mm512_dpbf16_ps(sum11, pair, pair);
  }
  const __m512 low = _mm512_add_ps(_mm512_add_ps(sum0, sum1), _mm512_add_ps(sum2, sum3));
  const __m512 mid = _mm512_add_ps(_mm512_add_ps(sum4, sum5), _mm512_add_ps(sum6, sum7));
  const __m512 high = _mm512_add_ps(_mm512_add_ps(sum8, sum9), _mm512_add_ps(sum10, sum11));
  opaque = static_cast<int>(_mm512_cvtss_f32(_mm512_add_ps(_mm512_add_ps(low, mid), high)));
  return 4.0 * static_cast<double>(rounds * 12 * 16);
}
#endif

}  // namespace

HWY_EXPORT(multiply_adds);
HWY_EXPORT(tile_products);
HWY_EXPORT(read_all);
HWY_EXPORT(target_name);

int threads() { return omp_get_max_threads(); }

double multiply_add_rounds(std::int64_t rounds) {
  double operations = 0.0;
#pragma omp parallel reduction(+ : operations)
  operations += HWY_DYNAMIC_DISPATCH(multiply_adds)(rounds);
  return operations;
}

double bf16_dot_rounds(std::int64_t rounds) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) {
    double operations = 0.0;
#pragma omp parallel reduction(+ : operations)
    operations += bf16_dots(rounds);
    return operations;
  }
#endif
  (void)rounds;
  return 0.0;
}

double tile_product_rounds(std::int64_t rounds) {
  double operations = 0.0;
#pragma omp parallel reduction(+ : operations)
  operations += HWY_DYNAMIC_DISPATCH(tile_products)(rounds);
  return operations;
}

float read_floats(const float* data, std::int64_t floats) {
  const int parts = threads();
  const std::int64_t part = floats / parts / 64 * 64;
  float sum = 0.0F;
#pragma omp parallel for schedule(static) reduction(+ : sum)
  for (int i = 0; i < parts; ++i) {
    const std::int64_t end = i + 1 == parts ? floats : (i + 1) * part;
    sum += HWY_DYNAMIC_DISPATCH(read_all)(data + i * part, end - i * part);
  }
  return sum;
}

const char* vector_target() { return HWY_DYNAMIC_DISPATCH(target_name)(); }

}  // namespace annulus::kernels::cpu
#endif  // HWY_ONCE
