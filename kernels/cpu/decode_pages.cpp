#include "kernels/cpu/decode_pages.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "kernels/cpu/row_block.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/decode_pages.cpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"
#include "kernels/cpu/decode_heads-inl.hpp"
#include "kernels/cpu/decode_pairs-inl.hpp"
#include "kernels/cpu/decode_quads-inl.hpp"
#include "kernels/cpu/decode_stream-inl.hpp"
#include "kernels/cpu/decode_tile-inl.hpp"
#include "kernels/cpu/softmax_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

template <class Rows>
class DecodePages : DecodeQuads<Rows> {
  using Base = DecodeQuads<Rows>;
  using Base::head_of;
  using Base::o_stride_;
  using Base::problem_;
  using Base::q_stride_;
  using Base::quads_;
  using Base::sees_all;

 public:
  using Base::Base;
  using Base::scratch_floats;

  void compute(std::span<const AttentionState> partials) {
    std::array<Tile, 2> tiles;
    this->find(this->tokens_.begin, tiles[0]);
    std::int64_t unsettled = 0;
    for (std::size_t i = 0; tiles[i].count > 0; i = 1 - i) {
      Tile& next = tiles[1 - i];
      this->find(tiles[i].first + tiles[i].count, next);
      score(tiles[i], next);
      weigh(tiles[i]);
      add(tiles[i], next);
      if (this->ends_part(tiles[i])) {
        this->write_part(tiles[i], partials);
        unsettled = 0;
      } else if (++unsettled == kSettledTiles) {
        this->settle();
        unsettled = 0;
      }
    }
  }

 private:
  void score(const Tile& tile, const Tile& next) {
    for (std::size_t i = 0; i < quads_.size(); ++i) {
      const std::int64_t head = head_of(i) * problem_.k.strides[2] * Rows::kBytes;
      const CacheRows k{tile.k.data(), head};
      const CacheRows ahead{next.k.data(), head};
      for (std::int64_t token = 0; token < tile.count; token += kQuadKeys) {
        score_keys<Rows>(k, ahead, token, problem_.head_dim(), quads_[i].q, q_stride_,
                         quads_[i].s + token * kQuad);
      }
    }
  }

  void weigh(const Tile& tile) {
    const bool full = sees_all(tile);
    for (Quad& quad : quads_) {
      if (problem_.soft_cap > 0.0F) this->cap(quad);
      std::fill(quad.s + tile.count * kQuad, quad.s + kScores, kMinusInfinity);
      if (!full) this->mask(tile, quad);
      softmax(quad);
    }
  }

  // s ← exp(s − max) for a tile; a lane belongs to one row, so that only the maximum of a row has
  // to be brought together from several.
  static void softmax(Quad& quad) {
    const Floats d;
    const FloatVec log2e = hn::Set(d, kLog2E);
    RowGroup before;
    RowGroup max;
    for (int g = 0; g < kGroup; ++g) max[g] = before[g] = hn::Load(d, quad.max + g * kLanes);
    for (std::int64_t i = 0; i < kScores; i += kGroupLanes) {
      for (int g = 0; g < kGroup; ++g) {
        max[g] = hn::Max(max[g], hn::Load(d, quad.s + i + g * kLanes));
      }
    }
    HWY_ALIGN float rows[kQuad];
    store_reduced(max, MaxVectors(), rows);
    load_rows(rows, max);
    RowGroup base2;
    RowGroup factor;
    RowGroup total;
    for (int g = 0; g < kGroup; ++g) {
      hn::Store(max[g], d, quad.max + g * kLanes);
      base2[g] = base2_max(max[g]);
      factor[g] = exp2(d, hn::Sub(hn::Mul(before[g], log2e), base2[g]));
      total[g] = hn::Zero(d);
    }
    store_reduced(factor, MaxVectors(), quad.rescale);  // alike in all lanes of a row
    for (std::int64_t i = 0; i < kScores; i += kGroupLanes) {
      for (int g = 0; g < kGroup; ++g) {
        float* at = quad.s + i + g * kLanes;
        const FloatVec p = exp2(d, hn::MulSub(hn::Load(d, at), log2e, base2[g]));
        total[g] = hn::Add(total[g], p);
        hn::Store(p, d, at);
      }
    }
    for (int g = 0; g < kGroup; ++g) {
      float* sum = quad.sum + g * kLanes;
      hn::Store(hn::MulAdd(hn::Load(d, sum), factor[g], total[g]), d, sum);
      float* settled = quad.settled_sum + g * kLanes;
      hn::Store(hn::Mul(hn::Load(d, settled), factor[g]), d, settled);
    }
    for (std::int64_t r = 0; r < kQuad; ++r) quad.settled_rescale[r] *= quad.rescale[r];
  }

  void add(const Tile& tile, const Tile& next) {
    const bool full = sees_all(tile);
    for (std::size_t i = 0; i < quads_.size(); ++i) {
      Quad& quad = quads_[i];
      const std::int64_t head = head_of(i) * problem_.v.strides[2] * Rows::kBytes;
      const CacheRows v{tile.v.data(), head};
      const CacheRows ahead{next.v.data(), head};
      if (full) {
        add_values<Rows, Weights::all>(v, ahead, tile.count, problem_.value_dim(), quad.s,
                                       quad.rescale, quad.o, o_stride_);
      } else {
        add_values<Rows, Weights::kept>(v, ahead, tile.count, problem_.value_dim(), quad.s,
                                        quad.rescale, quad.o, o_stride_);
      }
    }
  }
};

std::int64_t scratch_on_target(const DecodeProblem& problem, std::int64_t queries) {
  std::int64_t floats = DecodePages<RowsF32>::scratch_floats(problem, queries);
#if ANNULUS_PAIRS
  floats += std::max(DecodeHeads<RowsFloats, 0>::scratch_floats(problem, queries),
                     DecodeStream<RowsFloats, 64>::scratch_floats(problem, queries));
#endif
  return floats;
}

#if ANNULUS_PAIRS
// The way by pairs adds to all rows of O every two tokens: it pays while they lie in L1.
bool o_stays_near(const DecodeProblem& problem, const DecodeBlock& block) {
  constexpr std::int64_t kNearFloats = std::int64_t{8} << 10;
  return block.queries.size() * problem.q_heads() * problem.value_dim() <= kNearFloats;
}

template <class Rows>
void decode_for_small_l1(const DecodeProblem& problem, const DecodeBlock& block,
                         std::span<const AttentionState> partials, Scratch& scratch) {
  if (streams<Rows>(problem, block)) {
    decode_stream<Rows>(problem, block, partials, scratch);
  } else {
    decode_heads<Rows>(problem, block, partials, scratch);
  }
}
#endif

void decode_on_target(const DecodeProblem& problem, const DecodeBlock& block,
                      std::span<const AttentionState> partials, Scratch& scratch) {
#if ANNULUS_PAIRS
  // In f32 no dot product is used, but this way was measured only on processors that have it.
  const bool by_heads = cpu::dot_decode() == cpu::DotDecode::heads;
  if (problem.q.dtype == DType::f32 && by_heads && cpu::has_bf16_dots()) {
    return decode_for_small_l1<RowsFloats>(problem, block, partials, scratch);
  }
  if (uses_bf16_dots(problem.q.dtype)) {
    if (by_heads) return decode_for_small_l1<RowsByBlocks>(problem, block, partials, scratch);
    if (o_stays_near(problem, block)) return decode_pairs(problem, block, partials, scratch);
  }
#endif
  if (problem.q.dtype == DType::f32) {
    DecodePages<RowsF32>(problem, block, scratch).compute(partials);
  } else if (problem.q.dtype == DType::f16) {
    DecodePages<RowsF16>(problem, block, scratch).compute(partials);
  } else {
    DecodePages<RowsBf16>(problem, block, scratch).compute(partials);
  }
}

}  // namespace
}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus::kernels {

HWY_EXPORT(scratch_on_target);
HWY_EXPORT(decode_on_target);

Span visible_tokens(const DecodeProblem& problem, std::int64_t sequence, std::int64_t query) {
  const auto integer = [](const ConstTensorView& view, std::int64_t i) -> std::int64_t {
    return static_cast<const std::int32_t*>(view.data)[i];
  };
  const std::int64_t length = integer(problem.lengths, sequence);
  const std::int64_t start = problem.starts ? integer(problem.starts, sequence) : 0;
  const std::int64_t position = length - integer(problem.query_begin, sequence + 1) + query;
  const Span keys = visible_keys(problem, position, start, length);
  return {problem.deal.tokens(keys.begin), problem.deal.tokens(keys.end)};
}

std::int64_t decode_pages_scratch(const DecodeProblem& problem, std::int64_t queries) {
  return HWY_DYNAMIC_DISPATCH(scratch_on_target)(problem, queries);
}

void decode_pages(const DecodeProblem& problem, const DecodeBlock& block,
                  std::span<const AttentionState> partials, Scratch& scratch) {
  HWY_DYNAMIC_DISPATCH(decode_on_target)(problem, block, partials, scratch);
}

}  // namespace annulus::kernels
#endif  // HWY_ONCE
