#include "kernels/cpu/decode_pages.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/row_block.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/decode_pages.cpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"
#include "kernels/cpu/decode_tile-inl.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/softmax_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

// Tokens of a tile. All heads read a tile before the next one is touched: they lie next to each
// other in memory. K and V of this tile and the next fit L2.
constexpr std::int64_t kTile = 16;
// Tiles whose sums are kept apart: each settling rounds what all tokens before have summed to.
constexpr std::int64_t kSettledTiles = 16;
// Scores of a quad: [token, row].
constexpr std::int64_t kScores = kTile * kQuad;

// Addresses of the tokens of a tile, for head 0.
struct Tile {
  std::int64_t first = 0;  // token
  std::int64_t count = 0;
  std::array<const char*, kTile + kQuadKeys> k{};
  std::array<const char*, kTile + kQuadKeys> v{};
};

// Four rows of one KV head.
struct Quad {
  float* q = nullptr;        // [kQuad, head_dim], scaled
  float* o = nullptr;        // [kQuad, value_dim]
  float* s = nullptr;        // [kTile, kQuad]
  float* max = nullptr;      // [kGroupLanes], the four rows over and over
  float* sum = nullptr;      // [kGroupLanes], of some of the tokens each
  float* rescale = nullptr;  // [kQuad]
  // O and sums of all tokens but those of the last tiles, and what O is yet to be multiplied by.
  float* settled_o = nullptr;
  float* settled_sum = nullptr;
  float* settled_rescale = nullptr;
  std::array<Span, kQuad> tokens;
};

template <class Rows>
class DecodePages {
 public:
  DecodePages(const DecodeProblem& problem, const DecodeBlock& block, Scratch& scratch)
      : problem_(problem),
        block_(block),
        q_stride_(round_up(problem.head_dim(), kPair)),
        o_stride_(round_up(problem.value_dim(), kPair)),
        rows_(block.queries.size() * problem.group_size()),
        quads_of_head_((rows_ + kQuad - 1) / kQuad) {
    std::vector<Span> tokens;
    for (std::int64_t i = 0; i < block.queries.size(); ++i) {
      tokens.push_back(visible_tokens(problem, block.sequence, block.queries.begin + i));
    }
    all_see_ = tokens.front();
    for (const Span& span : tokens) {
      all_see_ = intersect(all_see_, span);
      if (span.empty()) continue;
      tokens_ = tokens_.empty()
                    ? span
                    : Span{std::min(tokens_.begin, span.begin), std::max(tokens_.end, span.end)};
    }
    tokens_ = intersect(tokens_, block.tokens);
    for (std::int64_t head = 0; head < problem.kv_heads(); ++head) {
      for (std::int64_t i = 0; i < quads_of_head_; ++i) start(head, i * kQuad, tokens, scratch);
    }
  }

  static std::int64_t scratch_floats(const DecodeProblem& problem, std::int64_t queries) {
    const std::int64_t quads = (queries * problem.group_size() + kQuad - 1) / kQuad;
    return problem.kv_heads() * quads *
           (Scratch::room_for(kQuad * round_up(problem.head_dim(), kPair)) +
            2 * Scratch::room_for(kQuad * round_up(problem.value_dim(), kPair)) +
            Scratch::room_for(kScores) + 3 * Scratch::room_for(kGroupLanes) +
            2 * Scratch::room_for(kQuad));
  }

  void compute(const AttentionState& partial) {
    std::array<Tile, 2> tiles;
    find(tokens_.begin, tiles[0]);
    std::int64_t unsettled = 0;
    for (std::size_t i = 0; tiles[i].count > 0; i = 1 - i) {
      Tile& next = tiles[1 - i];
      find(tiles[i].first + tiles[i].count, next);
      score(tiles[i], next);
      weigh(tiles[i]);
      add(tiles[i], next);
      if (++unsettled < kSettledTiles && next.count > 0) continue;
      settle();
      unsettled = 0;
    }
    write(partial);
  }

 private:
  // Row r of a KV head is query r / group, and head r % group of the group.
  void start(std::int64_t kv_head, std::int64_t first, const std::vector<Span>& tokens,
             Scratch& scratch) {
    Quad quad;
    quad.q = scratch.take(kQuad * q_stride_);
    quad.o = scratch.take(kQuad * o_stride_);
    quad.s = scratch.take(kScores);
    quad.max = scratch.take(kGroupLanes);
    quad.sum = scratch.take(kGroupLanes);
    quad.rescale = scratch.take(kQuad);
    quad.settled_o = scratch.take(kQuad * o_stride_);
    quad.settled_sum = scratch.take(kGroupLanes);
    quad.settled_rescale = scratch.take(kQuad);
    std::fill_n(quad.q, kQuad * q_stride_, 0.0F);
    std::fill_n(quad.o, kQuad * o_stride_, 0.0F);
    std::fill_n(quad.max, kGroupLanes, kMinusInfinity);
    std::fill_n(quad.sum, kGroupLanes, 0.0F);
    std::fill_n(quad.settled_o, kQuad * o_stride_, 0.0F);
    std::fill_n(quad.settled_sum, kGroupLanes, 0.0F);
    std::fill_n(quad.settled_rescale, kQuad, 1.0F);
    const std::int64_t dim = problem_.head_dim();
    widened_.resize(static_cast<std::size_t>(dim));
    for (std::int64_t r = 0; r < kQuad; ++r) {
      const std::int64_t row = std::min(first + r, rows_ - 1);  // repeats the last one
      const std::int64_t query = row / problem_.group_size();
      quad.tokens[static_cast<std::size_t>(r)] = tokens[static_cast<std::size_t>(query)];
      load_row(problem_.q.data, problem_.q.dtype,
               (block_.queries.begin + query) * problem_.q.strides[0] +
                   (kv_head * problem_.group_size() + row % problem_.group_size()) *
                       problem_.q.strides[1],
               dim, widened_.data());
      for (std::int64_t d = 0; d < dim; ++d) {
        quad.q[r * q_stride_ + packed_place<Rows>(d)] =
            widened_[static_cast<std::size_t>(d)] * problem_.scale;
      }
    }
    quads_.push_back(quad);
  }

  void find(std::int64_t first, Tile& tile) const {
    tile.first = first;
    tile.count = std::clamp<std::int64_t>(tokens_.end - first, 0, kTile);
    const auto* table = static_cast<const std::int32_t*>(problem_.page_table.data) +
                        block_.sequence * problem_.max_pages();
    const std::int64_t page_size = problem_.page_size();
    const auto address = [&](const ConstTensorView& view, std::int64_t page, std::int64_t row) {
      return static_cast<const char*>(view.data) +
             (page * view.strides[0] + row * view.strides[1]) * Rows::kBytes;
    };
    std::int64_t page = first / page_size;
    std::int64_t row = first % page_size;
    for (std::int64_t i = 0; i < tile.count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      tile.k[at] = address(problem_.k, table[page], row);
      tile.v[at] = address(problem_.v, table[page], row);
      if (++row < page_size) continue;
      row = 0;
      ++page;
    }
    // Products read whole quads of keys, and ask for rows of a tile that may be shorter or empty.
    const auto* nothing = static_cast<const char*>(problem_.q.data);
    for (auto i = static_cast<std::size_t>(tile.count); i < tile.k.size(); ++i) {
      tile.k[i] = i > 0 ? tile.k[i - 1] : nothing;
      tile.v[i] = i > 0 ? tile.v[i - 1] : nothing;
    }
  }

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
      if (problem_.soft_cap > 0.0F) cap(quad);
      std::fill(quad.s + tile.count * kQuad, quad.s + kScores, kMinusInfinity);
      if (!full) mask(tile, quad);
      softmax(quad);
    }
  }

  bool sees_all(const Tile& tile) const {
    return all_see_.begin <= tile.first && tile.first + tile.count <= all_see_.end;
  }

  void cap(Quad& quad) const {
    const Floats d;
    const FloatVec outer = hn::Set(d, problem_.soft_cap);
    const FloatVec inner = hn::Set(d, 1.0F / problem_.soft_cap);
    for (std::int64_t i = 0; i < kScores; i += kLanes) {
      hn::Store(hn::Mul(outer, tanh(d, hn::Mul(hn::Load(d, quad.s + i), inner))), d, quad.s + i);
    }
  }

  void mask(const Tile& tile, Quad& quad) const {
    for (std::int64_t r = 0; r < kQuad; ++r) {
      const Span seen = quad.tokens[static_cast<std::size_t>(r)];
      for (std::int64_t i = 0; i < tile.count; ++i) {
        if (!seen.contains(tile.first + i)) quad.s[i * kQuad + r] = kMinusInfinity;
      }
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

  // The sums of the last tiles join those of all before, beside which a single tile's small terms
  // would be rounded away.
  void settle() {
    const Floats d;
    for (const Quad& quad : quads_) {
      for (std::int64_t i = 0; i < kGroupLanes; i += kLanes) {
        float* settled = quad.settled_sum + i;
        hn::Store(hn::Add(hn::Load(d, settled), hn::Load(d, quad.sum + i)), d, settled);
        hn::Store(hn::Zero(d), d, quad.sum + i);
      }
      for (std::int64_t r = 0; r < kQuad; ++r) {
        const FloatVec rescale = hn::Set(d, quad.settled_rescale[r]);
        float* o = quad.o + r * o_stride_;
        float* settled = quad.settled_o + r * o_stride_;
        for (std::int64_t i = 0; i < o_stride_; i += kLanes) {
          hn::Store(hn::MulAdd(hn::Load(d, settled + i), rescale, hn::Load(d, o + i)), d,
                    settled + i);
          hn::Store(hn::Zero(d), d, o + i);
        }
        quad.settled_rescale[r] = 1.0F;
      }
    }
  }

  std::int64_t head_of(std::size_t quad) const {
    return static_cast<std::int64_t>(quad) / quads_of_head_;
  }

  void write(const AttentionState& partial) const {
    HWY_ALIGN float sums[kQuad];
    for (std::size_t i = 0; i < quads_.size(); ++i) {
      const Quad& quad = quads_[i];
      RowGroup group;
      for (int g = 0; g < kGroup; ++g) group[g] = hn::Load(Floats(), quad.settled_sum + g * kLanes);
      store_reduced(group, AddVectors(), sums);
      const std::int64_t first = static_cast<std::int64_t>(i) % quads_of_head_ * kQuad;
      for (std::int64_t r = 0; r < std::min(kQuad, rows_ - first); ++r) {
        const std::int64_t query = (first + r) / problem_.group_size();
        const std::int64_t head =
            head_of(i) * problem_.group_size() + (first + r) % problem_.group_size();
        const auto statistic = [&](const TensorView& view) -> float& {
          return static_cast<float*>(view.data)[statistic_offset(view, 0, head, query)];
        };
        statistic(partial.row_max) = quad.max[r];
        statistic(partial.row_sum) = sums[r];
        float* o = static_cast<float*>(partial.accumulator.data) +
                   row_offset(partial.accumulator, 0, query, head);
        for (std::int64_t d = 0; d < problem_.value_dim(); ++d) {
          o[d] = quad.settled_o[r * o_stride_ + packed_place<Rows>(d)];
        }
      }
    }
  }

  const DecodeProblem& problem_;
  const DecodeBlock& block_;
  std::int64_t q_stride_;
  std::int64_t o_stride_;
  std::int64_t rows_;  // of a KV head
  std::int64_t quads_of_head_;
  Span tokens_;   // that some row sees
  Span all_see_;  // that every row sees
  std::vector<Quad> quads_;
  std::vector<float> widened_;
};

std::int64_t scratch_on_target(const DecodeProblem& problem, std::int64_t queries) {
  return DecodePages<RowsF32>::scratch_floats(problem, queries);
}

void decode_on_target(const DecodeProblem& problem, const DecodeBlock& block,
                      const AttentionState& partial, Scratch& scratch) {
  if (problem.q.dtype == DType::f32) {
    DecodePages<RowsF32>(problem, block, scratch).compute(partial);
  } else if (problem.q.dtype == DType::f16) {
    DecodePages<RowsF16>(problem, block, scratch).compute(partial);
  } else {
    DecodePages<RowsBf16>(problem, block, scratch).compute(partial);
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
                  const AttentionState& partial, Scratch& scratch) {
  HWY_DYNAMIC_DISPATCH(decode_on_target)(problem, block, partial, scratch);
}

}  // namespace annulus::kernels
#endif  // HWY_ONCE
