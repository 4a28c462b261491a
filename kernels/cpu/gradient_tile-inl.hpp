// Element by element through the softmax of a tile [keys, lanes]: P again from the log-sum-exp, and
// dS from dP.
#if defined(ANNULUS_CPU_GRADIENT_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_GRADIENT_TILE_INL
#undef ANNULUS_CPU_GRADIENT_TILE_INL
#else
#define ANNULUS_CPU_GRADIENT_TILE_INL
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/cpu/softmax_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// to[i] += from[i]·factor for n elements, a multiple of 8.
HWY_INLINE void add_scaled(const float* HWY_RESTRICT from, float factor, std::int64_t n,
                           float* HWY_RESTRICT to) {
  const Eight d;
  const auto scale = hn::Set(d, factor);
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < n; i += lanes) {
    hn::StoreU(hn::MulAdd(hn::LoadU(d, from + i), scale, hn::LoadU(d, to + i)), d, to + i);
  }
}

/// s ← exp(s·scale − lse), 0 where s is −inf. The difference is taken before the change to base 2:
/// rounding lse·log2(e) would double the error that P has from an f32 log-sum-exp.
template <bool kMasked>
void recompute_probabilities(std::int64_t keys, std::int64_t vectors, float scale, const float* lse,
                             float* s) {
  const Floats d;
  const FloatVec factor = hn::Set(d, scale);
  const FloatVec to_base2 = hn::Set(d, kLog2E);
  for_each_vector(keys, vectors, s, [&](std::int64_t, std::int64_t v, float* at) HWY_ATTR {
    const FloatVec logit = hn::Load(d, at);
    const FloatVec x = hn::MulSub(logit, factor, hn::Load(d, lse + v * kLanes));
    FloatVec p = exp2(d, hn::Mul(x, to_base2));
    // The row of a NaN has one for its log-sum-exp too, and yet no weight for what a mask drops.
    if (kMasked) p = hn::IfThenZeroElse(hn::Eq(logit, hn::Set(d, kMinusInfinity)), p);
    hn::Store(p, d, at);
  });
}

/// dp ← p·(dp − delta), and 0 where p is 0: what a mask drops may hold anything.
inline void logit_gradient(std::int64_t keys, std::int64_t vectors, const float* p,
                           const float* delta, float* dp) {
  const Floats d;
  for_each_vector(keys, vectors, dp, [&](std::int64_t, std::int64_t v, float* at) HWY_ATTR {
    const FloatVec weight = hn::Load(d, p + (at - dp));
    const FloatVec grad =
        hn::Mul(weight, hn::Sub(hn::Load(d, at), hn::Load(d, delta + v * kLanes)));
    hn::Store(hn::IfThenZeroElse(hn::Eq(weight, hn::Zero(d)), grad), d, at);
  });
}

/// ds ← ds·(1 − (capped / cap)²), and 0 where ds is 0, as above.
inline void cap_gradient(std::int64_t keys, std::int64_t vectors, const float* capped, float cap,
                         float* ds) {
  const Floats d;
  const FloatVec inverse = hn::Set(d, 1.0F / cap);
  for_each_vector(keys, vectors, ds, [&](std::int64_t, std::int64_t, float* at) HWY_ATTR {
    const FloatVec t = hn::Mul(hn::Load(d, capped + (at - ds)), inverse);
    const FloatVec grad = hn::Load(d, at);
    const FloatVec sloped = hn::Mul(grad, hn::NegMulAdd(t, t, hn::Set(d, 1.0F)));
    hn::Store(hn::IfThenZeroElse(hn::Eq(grad, hn::Zero(d)), sloped), d, at);
  });
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_GRADIENT_TILE_INL
