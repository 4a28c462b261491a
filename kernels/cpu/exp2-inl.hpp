// The exponential and the hyperbolic tangent of the softmax.
#if defined(ANNULUS_CPU_EXP2_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_EXP2_INL
#undef ANNULUS_CPU_EXP2_INL
#else
#define ANNULUS_CPU_EXP2_INL
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr float kLog2E = 1.44269504088896341F;
inline constexpr float kLn2 = 0.693147180559945309F;

/// (2^f − 1) / f for |f| ≤ 1/2: the minimax fit of 2^f with relative error 2.0e-9 and 2^0 = 1.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2_slope(D d, V f) {
  V p = hn::Set(d, 0x1.41fbbcp-13F);
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.5f3e54p-10F));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.3b2d4cp-7F));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.c6aee8p-5F));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.ebfbdcp-3F));
  return hn::MulAdd(p, f, hn::Set(d, 0x1.62e430p-1F));
}

/// 2^x for x ≤ 127, at most 0.94 ulp off (all of [−1/2, 1/2] was tried), exactly 1 at 0, 0 at −∞;
/// below −126 it may already be 0. A NaN stays one.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2(D d, V x) {
  // Adding 1.5·2^23 rounds x to an integer n in the low mantissa bits.
  const V magic = hn::Set(d, 0x1.8p23F);
  const V shifted = hn::Add(x, magic);
  const V n = hn::Sub(shifted, magic);
  const V f = hn::Sub(x, n);
  const V mantissa = hn::MulAdd(exp2_slope(d, f), f, hn::Set(d, 1.0F));
#if HWY_TARGET == HWY_AVX3
  return V{_mm512_scalef_ps(mantissa.raw, n.raw)};  // NaN·2^−∞ is 0 here
#else
  const hn::RebindToSigned<D> di;
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  const V power = hn::BitCast(d, hn::Add(hn::BitCast(di, mantissa), exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0F)), power);
#endif
}

/// tanh with a relative error of a few ulp everywhere, through e^(−2|x|) − 1.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V tanh(D d, V x) {
  const hn::RebindToSigned<D> di;
  const V one = hn::Set(d, 1.0F);
  // Beyond 2|x|·log2(e) = 60 the quotient is 1; NaN passes through Max's second operand.
  const V t = hn::Max(hn::Set(d, -60.0F), hn::Mul(hn::Abs(x), hn::Set(d, -2.0F * kLog2E)));
  const V magic = hn::Set(d, 0x1.8p23F);
  const V shifted = hn::Add(t, magic);
  const V f = hn::Sub(t, hn::Sub(shifted, magic));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  const V power = hn::BitCast(d, hn::Add(hn::BitCast(di, one), exponent));
  const V expm1 = hn::MulAdd(power, hn::Mul(exp2_slope(d, f), f), hn::Sub(power, one));
  const V magnitude = hn::Neg(hn::Div(expm1, hn::Add(expm1, hn::Set(d, 2.0F))));
  return hn::CopySignToAbs(magnitude, x);
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_EXP2_INL
