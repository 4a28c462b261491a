// The online softmax of one tile [keys, lanes]: a lane is a query, so that maximum, sum and mask
// need no operation across lanes.
#if defined(ANNULUS_CPU_SOFTMAX_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_SOFTMAX_TILE_INL
#undef ANNULUS_CPU_SOFTMAX_TILE_INL
#else
#define ANNULUS_CPU_SOFTMAX_TILE_INL
#endif

#include <algorithm>
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

/// Where the keys that a run's only slice keeps begin and end, counted from the run's first key.
struct RunEdges {
  alignas(64) std::int32_t begin[kTileLanes];
  alignas(64) std::int32_t end[kTileLanes];
  Span seen[kTileVectors];  // by some lane of a vector
  Span common;              // by every lane

  RunEdges(const KeyRun& run, const TileRows& rows, std::int64_t vectors)
      : common{0, run.keys.size()} {
    for (std::int64_t lane = 0; lane < vectors * kLanes; ++lane) {
      const Span span = keys_in_run(run, run.slices[0], rows.query[static_cast<std::size_t>(lane)]);
      begin[lane] = static_cast<std::int32_t>(span.begin);
      end[lane] = static_cast<std::int32_t>(span.end);
      common = intersect(common, span);
      Span& of_vector = seen[lane / kLanes];
      if (span.empty()) continue;
      of_vector = of_vector.empty() ? span
                                    : Span{std::min(of_vector.begin, span.begin),
                                           std::max(of_vector.end, span.end)};
    }
  }

  /// The vectors that see some of these keys, and those between them.
  Span vectors_of(Span keys) const {
    Span vectors;
    for (std::int64_t v = 0; v < kTileVectors; ++v) {
      if (intersect(seen[v], keys).empty()) continue;
      vectors = {vectors.empty() ? v : vectors.begin, v + 1};
    }
    return vectors;
  }
};

/// s ← −inf outside the only slice of a run.
inline void drop_outside(const RunEdges& edges, std::int64_t keys, std::int64_t vectors,
                         float* HWY_RESTRICT s) {
  const Floats d;
  const hn::RebindToSigned<Floats> di;
  for (std::int64_t key = 0; key < keys; ++key) {
    if (edges.common.contains(key)) {
      key = edges.common.end - 1;
      continue;
    }
    const auto index = hn::Set(di, static_cast<std::int32_t>(key));
    for (std::int64_t v = 0; v < vectors; ++v) {
      const auto inside = hn::AndNot(hn::Lt(index, hn::Load(di, edges.begin + v * kLanes)),
                                     hn::Lt(index, hn::Load(di, edges.end + v * kLanes)));
      float* at = s + key * kTileLanes + v * kLanes;
      hn::Store(
          hn::IfThenElse(hn::RebindMask(d, inside), hn::Load(d, at), hn::Set(d, kMinusInfinity)), d,
          at);
    }
  }
}

/// Running softmax of the lanes of a tile, in natural logits.
struct LaneState {
  float* max = nullptr;
  float* sum = nullptr;
};

/// The maximum in base 2, or 0 for a lane that has seen no key, so that −inf − max stays −inf.
HWY_INLINE FloatVec base2_max(FloatVec max) {
  const Floats d;
  const auto empty = hn::Eq(max, hn::Set(d, kMinusInfinity));
  return hn::IfThenZeroElse(empty, hn::Mul(max, hn::Set(d, kLog2E)));
}

/// Raises the maximum of each lane to its largest s·scale.
template <int kVectors>
HWY_INLINE void raise_max(std::int64_t keys, float scale, const float* HWY_RESTRICT s,
                          float* HWY_RESTRICT max) {
  const Floats d;
  FloatVec largest[kVectors];
  HWY_UNROLL(3)
  for (int v = 0; v < kVectors; ++v) largest[v] = hn::Load(d, s + v * kLanes);
  for (std::int64_t key = 1; key < keys; ++key) {
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) {
      largest[v] = hn::Max(largest[v], hn::Load(d, s + key * kTileLanes + v * kLanes));
    }
  }
  HWY_UNROLL(3)
  for (int v = 0; v < kVectors; ++v) {
    const FloatVec scaled = hn::Mul(largest[v], hn::Set(d, scale));
    hn::Store(hn::Max(hn::Load(d, max + v * kLanes), scaled), d, max + v * kLanes);
  }
}

template <int kVectors>
HWY_NOINLINE void softmax_vectors(std::int64_t keys, float scale, float* HWY_RESTRICT s,
                                  const LaneState& state, float* HWY_RESTRICT rescale) {
  const Floats d;
  const FloatVec log2e = hn::Set(d, kLog2E);
  FloatVec before[kVectors];
  FloatVec max[kVectors];
  FloatVec sum[kVectors];
  HWY_UNROLL(3)
  for (int v = 0; v < kVectors; ++v) {
    before[v] = hn::Mul(hn::Load(d, state.max + v * kLanes), log2e);
  }
  raise_max<kVectors>(keys, scale, s, state.max);
  HWY_UNROLL(3)
  for (int v = 0; v < kVectors; ++v) {
    max[v] = base2_max(hn::Load(d, state.max + v * kLanes));
    const FloatVec factor = exp2(d, hn::Sub(before[v], max[v]));
    hn::Store(factor, d, rescale + v * kLanes);
    sum[v] = hn::Zero(d);  // summed apart from the running sum, as in gemm_panel
  }
  const FloatVec to_base2 = hn::Set(d, scale * kLog2E);
  for (std::int64_t key = 0; key < keys; ++key) {
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) {
      float* at = s + key * kTileLanes + v * kLanes;
      const FloatVec p = exp2(d, hn::MulSub(hn::Load(d, at), to_base2, max[v]));
      sum[v] = hn::Add(sum[v], p);
      hn::Store(p, d, at);
    }
  }
  HWY_UNROLL(3)
  for (int v = 0; v < kVectors; ++v) {
    const FloatVec running =
        hn::Mul(hn::Load(d, state.sum + v * kLanes), hn::Load(d, rescale + v * kLanes));
    hn::Store(hn::Add(running, sum[v]), d, state.sum + v * kLanes);
  }
}

/// s ← exp(s·scale − max) after raising the maximum; the sum follows, and `rescale` receives the
/// factor that the accumulator of each lane needs.
/// @pre keys > 0
inline void softmax_tile(std::int64_t keys, std::int64_t vectors, float scale, float* s,
                         const LaneState& state, float* rescale) {
  if (vectors == 3) return softmax_vectors<3>(keys, scale, s, state, rescale);
  if (vectors == 2) return softmax_vectors<2>(keys, scale, s, state, rescale);
  softmax_vectors<1>(keys, scale, s, state, rescale);
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_SOFTMAX_TILE_INL
