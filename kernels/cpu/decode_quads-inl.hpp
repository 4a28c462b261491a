// What decode attention keeps of a block: its rows by fours, with their sums, and where the tokens
// that they see lie in the cache.
#if defined(ANNULUS_CPU_DECODE_QUADS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DECODE_QUADS_INL
#undef ANNULUS_CPU_DECODE_QUADS_INL
#else
#define ANNULUS_CPU_DECODE_QUADS_INL
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/decode_pages.hpp"
#include "kernels/cpu/decode_tile-inl.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/cpu/softmax_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

// Tokens of a tile. All heads read a tile before the next one is touched: they lie next to each
// other in memory. K and V of this tile and the next fit L2.
inline constexpr std::int64_t kTile = 16;
// Tiles whose sums are kept apart: each settling rounds what all tokens before have summed to.
inline constexpr std::int64_t kSettledTiles = 16;
// Scores of a quad: [token, row].
inline constexpr std::int64_t kScores = kTile * kQuad;
// The page table leaves L2 between two lines of it, unless asked for so far ahead.
inline constexpr std::int64_t kPagesAhead = 8;

struct TokenRange {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

// Addresses of the tokens of a tile, for head 0.
struct Tile : TokenRange {
  std::array<const char*, kTile + kQuadKeys> k{};
  std::array<const char*, kTile + kQuadKeys> v{};
};

// Four rows of one KV head.
struct Quad {
  float* q = nullptr;        // [kQuad, head_dim] as Rows::store_query() leaves it
  float* o = nullptr;        // [kQuad, value_dim]
  float* s = nullptr;        // [kTile, kQuad], and room for as much again
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
class DecodeQuads {
 public:
  DecodeQuads(const DecodeProblem& problem, const DecodeBlock& block, Scratch& scratch)
      : problem_(problem),
        q_stride_(Rows::query_stride(problem.head_dim())),
        o_stride_(round_up(problem.value_dim(), kPair)),
        rows_(block.queries.size() * problem.group_size()),
        quads_of_head_((rows_ + kQuad - 1) / kQuad),
        block_(block) {
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
    for (Quad& quad : quads_) quad.o = scratch.take(kQuad * o_stride_);
    for (Quad& quad : quads_) take_settled(quad, scratch);
    start_part();
  }

  static std::int64_t scratch_floats(const DecodeProblem& problem, std::int64_t queries) {
    const std::int64_t quads = (queries * problem.group_size() + kQuad - 1) / kQuad;
    return problem.kv_heads() * quads *
           (Scratch::room_for(kQuad * Rows::query_stride(problem.head_dim())) +
            2 * Scratch::room_for(kQuad * round_up(problem.value_dim(), kPair)) +
            Scratch::room_for(2 * kScores) + 3 * Scratch::room_for(kGroupLanes) +
            2 * Scratch::room_for(kQuad));
  }

 protected:
  void find(std::int64_t first, Tile& tile) const {
    tile.first = first;
    tile.count = std::clamp<std::int64_t>(tokens_.end - first, 0, kTile);
    find_run({first, first + tile.count}, 0, 1, tile);
    // Products read whole quads of keys, and ask for rows of a tile that may be shorter or empty.
    const auto* nothing = static_cast<const char*>(problem_.q.data);
    for (auto i = static_cast<std::size_t>(tile.count); i < tile.k.size(); ++i) {
      tile.k[i] = i > 0 ? tile.k[i - 1] : nothing;
      tile.v[i] = i > 0 ? tile.v[i - 1] : nothing;
    }
  }

  // Addresses of some tokens, to places `at`, `at` + `step` ... of the tile.
  template <class AnyTile>
  void find_run(Span tokens, std::size_t at, std::size_t step, AnyTile& tile) const {
    const auto* table = static_cast<const std::int32_t*>(problem_.page_table.data) +
                        block_.sequence * problem_.max_pages();
    const std::int64_t page_size = problem_.page_size();
    const auto address = [&](const ConstTensorView& view, std::int64_t page, std::int64_t row) {
      return static_cast<const char*>(view.data) +
             (page * view.strides[0] + row * view.strides[1]) * Rows::kBytes;
    };
    std::int64_t page = tokens.begin / page_size;
    std::int64_t row = tokens.begin % page_size;
    for (std::int64_t token = tokens.begin; token < tokens.end; ++page, row = 0) {
      const std::int64_t end = std::min(tokens.end, token + page_size - row);
      __builtin_prefetch(table + page + kPagesAhead, 0, 2);
      const char* k = address(problem_.k, table[page], row);
      const char* v = address(problem_.v, table[page], row);
      for (; token < end; ++token, at += step) {
        tile.k[at] = k;
        tile.v[at] = v;
        k += problem_.k.strides[1] * Rows::kBytes;
        v += problem_.v.strides[1] * Rows::kBytes;
      }
    }
  }

  bool sees_all(const TokenRange& tile) const {
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

  void mask(const TokenRange& tile, Quad& quad) const {
    for (std::int64_t r = 0; r < kQuad; ++r) {
      const Span seen = quad.tokens[static_cast<std::size_t>(r)];
      for (std::int64_t i = 0; i < tile.count; ++i) {
        if (!seen.contains(tile.first + i)) quad.s[i * kQuad + r] = kMinusInfinity;
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
          const FloatVec before = settled_ ? hn::Load(d, settled + i) : hn::Zero(d);
          hn::Store(hn::MulAdd(before, rescale, hn::Load(d, o + i)), d, settled + i);
          hn::Store(hn::Zero(d), d, o + i);
        }
        quad.settled_rescale[r] = 1.0F;
      }
    }
    settled_ = true;
  }

  std::int64_t head_of(std::size_t quad) const {
    return static_cast<std::int64_t>(quad) / quads_of_head_;
  }

  bool ends_part(const TokenRange& tile) const {
    const std::int64_t end = tile.first + tile.count;
    return end == tokens_.end || (end - tokens_.begin) % block_.part == 0;
  }

  /// The state of the part that the tile ends; then that of the next one starts.
  void write_part(const TokenRange& tile, std::span<const AttentionState> partials) {
    if (settled_) settle();
    write(partials[static_cast<std::size_t>((tile.first - tokens_.begin) / block_.part)]);
    start_part();
  }

  const DecodeProblem& problem_;
  std::int64_t q_stride_;
  std::int64_t o_stride_;
  std::int64_t rows_;  // of a KV head
  std::int64_t quads_of_head_;
  Span tokens_;   // that some row sees
  Span all_see_;  // that every row sees
  std::vector<Quad> quads_;

 private:
  const DecodeBlock& block_;
  bool settled_ = false;  // whether there are sums of this part that are

  void start_part() {
    settled_ = false;
    for (Quad& quad : quads_) {
      std::fill_n(quad.max, kGroupLanes, kMinusInfinity);
      std::fill_n(quad.o, kQuad * o_stride_, 0.0F);
      std::fill_n(quad.sum, kGroupLanes, 0.0F);
      std::fill_n(quad.settled_sum, kGroupLanes, 0.0F);
      std::fill_n(quad.settled_rescale, kQuad, 1.0F);
    }
  }

  void write(const AttentionState& partial) const {
    HWY_ALIGN float sums[kQuad];
    for (std::size_t i = 0; i < quads_.size(); ++i) {
      const Quad& quad = quads_[i];
      RowGroup group;
      const float* sum = settled_ ? quad.settled_sum : quad.sum;
      for (int g = 0; g < kGroup; ++g) group[g] = hn::Load(Floats(), sum + g * kLanes);
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
        write_row((settled_ ? quad.settled_o : quad.o) + r * o_stride_,
                  static_cast<float*>(partial.accumulator.data) +
                      row_offset(partial.accumulator, 0, query, head));
      }
    }
  }

  // Places that are constants for all columns but the last ones: a part of 2,048 keys spent 1.4% of
  // its time on computing them.
  void write_row(const float* HWY_RESTRICT packed, float* HWY_RESTRICT o) const {
    const std::int64_t columns = problem_.value_dim();
    const std::int64_t whole = columns / kPair * kPair;
    for (std::int64_t column = 0; column < whole; column += kPair) {
      HWY_UNROLL(32)
      for (std::int64_t i = 0; i < kPair; ++i) o[column + i] = packed[column + Rows::place(i)];
    }
    for (std::int64_t column = whole; column < columns; ++column) {
      o[column] = packed[packed_place<Rows>(column)];
    }
  }

  // Row r of a KV head is query r / group, and head r % group of the group.
  void start(std::int64_t kv_head, std::int64_t first, const std::vector<Span>& tokens,
             Scratch& scratch) {
    Quad quad;
    quad.q = zeros(kQuad * q_stride_, scratch);
    quad.s = scratch.take(2 * kScores);
    quad.max = scratch.take(kGroupLanes);
    quad.sum = scratch.take(kGroupLanes);
    quad.rescale = scratch.take(kQuad);
    const std::int64_t dim = problem_.head_dim();
    std::vector<float> row_of_q(static_cast<std::size_t>(dim));
    for (std::int64_t r = 0; r < kQuad; ++r) {
      const std::int64_t row = std::min(first + r, rows_ - 1);  // repeats the last one
      const std::int64_t query = row / problem_.group_size();
      quad.tokens[static_cast<std::size_t>(r)] = tokens[static_cast<std::size_t>(query)];
      load_row(problem_.q.data, problem_.q.dtype,
               (block_.queries.begin + query) * problem_.q.strides[0] +
                   (kv_head * problem_.group_size() + row % problem_.group_size()) *
                       problem_.q.strides[1],
               dim, row_of_q.data());
      Rows::store_query(row_of_q, problem_.scale, quad.q + r * q_stride_);
    }
    quads_.push_back(quad);
  }

  static float* zeros(std::int64_t floats, Scratch& scratch) {
    float* to = scratch.take(floats);
    std::fill_n(to, floats, 0.0F);
    return to;
  }

  // Seldom touched, and therefore not between what stays in L1.
  void take_settled(Quad& quad, Scratch& scratch) const {
    quad.settled_o = scratch.take(kQuad * o_stride_);
    quad.settled_sum = scratch.take(kGroupLanes);
    quad.settled_rescale = scratch.take(kQuad);
  }
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_DECODE_QUADS_INL
