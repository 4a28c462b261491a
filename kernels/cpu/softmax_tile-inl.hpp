// The online softmax of one tile [keys, lanes]: a lane is a query, so that maximum, sum and mask
// need no operation across lanes.
#if defined(ANNULUS_CPU_SOFTMAX_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_SOFTMAX_TILE_INL
#undef ANNULUS_CPU_SOFTMAX_TILE_INL
#else
#define ANNULUS_CPU_SOFTMAX_TILE_INL
#endif

#include <cstdint>
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/exp2-inl.hpp"
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/cpu/key_runs.hpp"
#include "kernels/cpu/row_block.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// Visits every vector of a tile [keys, vectors] with its key and address.
template <typename Visit>
HWY_INLINE void for_each_vector(std::int64_t keys, std::int64_t vectors, float* tile, Visit visit) {
  for (std::int64_t key = 0; key < keys; ++key) {
    for (std::int64_t v = 0; v < vectors; ++v) {
      visit(key, v, tile + key * kTileLanes + v * kLanes);
    }
  }
}

/// s ← cap·tanh(s·scale / cap).
inline void cap_tile(std::int64_t keys, std::int64_t vectors, float scale, float cap, float* s) {
  const Floats d;
  const FloatVec inner = hn::Set(d, scale / cap);
  const FloatVec outer = hn::Set(d, cap);
  for_each_vector(keys, vectors, s, [&](std::int64_t, std::int64_t, float* at) HWY_ATTR {
    hn::Store(hn::Mul(outer, tanh(d, hn::Mul(hn::Load(d, at), inner))), d, at);
  });
}

/// s ← s·scale + addend.
inline void scale_and_add_tile(std::int64_t keys, std::int64_t vectors, float scale,
                               const float* HWY_RESTRICT addend, float* HWY_RESTRICT s) {
  const Floats d;
  const FloatVec factor = hn::Set(d, scale);
  for_each_vector(keys, vectors, s, [&](std::int64_t, std::int64_t, float* at) HWY_ATTR {
    hn::Store(hn::MulAdd(hn::Load(d, at), factor, hn::Load(d, addend + (at - s))), d, at);
  });
}

/// s ← −inf where `kept` is 0.
inline void drop_tile(std::int64_t keys, std::int64_t vectors, const float* HWY_RESTRICT kept,
                      float* HWY_RESTRICT s) {
  const Floats d;
  for_each_vector(keys, vectors, s, [&](std::int64_t, std::int64_t, float* at) HWY_ATTR {
    const auto dropped = hn::Eq(hn::Load(d, kept + (at - s)), hn::Zero(d));
    hn::Store(hn::IfThenElse(dropped, hn::Set(d, kMinusInfinity), hn::Load(d, at)), d, at);
  });
}

/// s ← s·factor.
inline void multiply_tile(std::int64_t keys, std::int64_t vectors, const float* HWY_RESTRICT factor,
                          float* HWY_RESTRICT s) {
  const Floats d;
  for_each_vector(keys, vectors, s, [&](std::int64_t, std::int64_t, float* at) HWY_ATTR {
    hn::Store(hn::Mul(hn::Load(d, at), hn::Load(d, factor + (at - s))), d, at);
  });
}

/// kept ← 1 inside the slices of a run, 0 outside.
inline void fill_kept(const KeyRun& run, const TileRows& rows, std::int64_t vectors,
                      float* HWY_RESTRICT kept) {
  const Floats d;
  const hn::RebindToSigned<Floats> di;
  const std::int64_t keys = run.keys.size();
  HWY_ALIGN std::int32_t begin[kTileLanes];
  HWY_ALIGN std::int32_t end[kTileLanes];
  for (std::size_t i = 0; i < run.slices.size(); ++i) {
    for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
      const Span span = keys_in_run(run, run.slices[i], rows.query[static_cast<std::size_t>(lane)]);
      begin[lane] = static_cast<std::int32_t>(span.begin);
      end[lane] = static_cast<std::int32_t>(span.end);
    }
    for_each_vector(keys, vectors, kept, [&](std::int64_t key, std::int64_t v, float* at) HWY_ATTR {
      const auto index = hn::Set(di, static_cast<std::int32_t>(key));
      const auto inside = hn::AndNot(hn::Lt(index, hn::Load(di, begin + v * kLanes)),
                                     hn::Lt(index, hn::Load(di, end + v * kLanes)));
      const FloatVec one = hn::IfThenElseZero(hn::RebindMask(d, inside), hn::Set(d, 1.0F));
      hn::Store(i == 0 ? one : hn::Max(one, hn::Load(d, at)), d, at);
    });
  }
}

/// Running softmax of the lanes of a tile, in natural logits.
struct LaneState {
  float* max = nullptr;
  float* sum = nullptr;
};

/// Raises `max` to the largest s·scale of each lane.
inline void raise_max(std::int64_t keys, std::int64_t vectors, float scale, const float* s,
                      float* max) {
  const Floats d;
  for (std::int64_t v = 0; v < vectors; ++v) {
    const float* at = s + v * kLanes;
    FloatVec even = hn::Set(d, kMinusInfinity);
    FloatVec odd = even;
    std::int64_t key = 0;
    for (; key + 1 < keys; key += 2, at += 2 * kTileLanes) {
      even = hn::Max(even, hn::Load(d, at));
      odd = hn::Max(odd, hn::Load(d, at + kTileLanes));
    }
    if (key < keys) even = hn::Max(even, hn::Load(d, at));
    const FloatVec scaled = hn::Mul(hn::Max(even, odd), hn::Set(d, scale));
    hn::Store(hn::Max(hn::Load(d, max + v * kLanes), scaled), d, max + v * kLanes);
  }
}

/// The maximum in base 2, or 0 for a lane that has seen no key, so that −inf − max stays −inf.
HWY_INLINE FloatVec base2_max(FloatVec max) {
  const Floats d;
  const auto empty = hn::Eq(max, hn::Set(d, kMinusInfinity));
  return hn::IfThenZeroElse(empty, hn::Mul(max, hn::Set(d, kLog2E)));
}

/// s ← exp(s·scale − max) after raising the maximum; the sum follows, and `rescale` receives the
/// factor that the accumulator of each lane needs.
inline void softmax_tile(std::int64_t keys, std::int64_t vectors, float scale,
                         float* HWY_RESTRICT s, const LaneState& state,
                         float* HWY_RESTRICT rescale) {
  const Floats d;
  HWY_ALIGN float old_max[kTileLanes];
  for (std::int64_t v = 0; v < vectors; ++v) {
    hn::Store(hn::Load(d, state.max + v * kLanes), d, old_max + v * kLanes);
  }
  raise_max(keys, vectors, scale, s, state.max);
  const FloatVec to_base2 = hn::Set(d, scale * kLog2E);
  for (std::int64_t v = 0; v < vectors; ++v) {
    const FloatVec max = base2_max(hn::Load(d, state.max + v * kLanes));
    const FloatVec before = hn::Mul(hn::Load(d, old_max + v * kLanes), hn::Set(d, kLog2E));
    const FloatVec factor = exp2(d, hn::Sub(before, max));
    FloatVec even = hn::Mul(hn::Load(d, state.sum + v * kLanes), factor);
    FloatVec odd = hn::Zero(d);
    float* at = s + v * kLanes;
    std::int64_t key = 0;
    for (; key + 1 < keys; key += 2, at += 2 * kTileLanes) {
      const FloatVec p0 = exp2(d, hn::MulSub(hn::Load(d, at), to_base2, max));
      const FloatVec p1 = exp2(d, hn::MulSub(hn::Load(d, at + kTileLanes), to_base2, max));
      even = hn::Add(even, p0);
      odd = hn::Add(odd, p1);
      hn::Store(p0, d, at);
      hn::Store(p1, d, at + kTileLanes);
    }
    if (key < keys) {
      const FloatVec p = exp2(d, hn::MulSub(hn::Load(d, at), to_base2, max));
      even = hn::Add(even, p);
      hn::Store(p, d, at);
    }
    hn::Store(hn::Add(even, odd), d, state.sum + v * kLanes);
    hn::Store(factor, d, rescale + v * kLanes);
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_SOFTMAX_TILE_INL
