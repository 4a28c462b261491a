#include "kernels/cpu/decode_tiles.hpp"

#include <algorithm>
#include <vector>

#include "kernels/cpu/amx.hpp"
#include "kernels/cpu/bf16_dots.hpp"
#include "kernels/cpu/page_rows.hpp"
#include "kernels/cpu/row_block.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/decode_tiles.cpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"
#include "kernels/cpu/amx_products-inl.hpp"
#include "kernels/cpu/decode_amx-inl.hpp"
#include "kernels/cpu/decode_dots-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

#if ANNULUS_AMX

// Tokens of a tile: O is read and written once for each, and keys, pairs of values, scores and
// weights of a tile stay in L2 beside Q and O.
constexpr std::int64_t kTokens = 256;
constexpr std::int64_t kTokenSteps = kTokens / kAmxDepth;
constexpr std::int64_t kTileWords = 256;  // of a right operand

/// Sᵀ = K·Qᵀ and O = P·V for many rows of one KV head: the absorbed form of latent attention, or a
/// chunk of prefill, by the tile unit or else by dot products. Lanes of scores are rows, so that
/// softmax needs no sums over lanes.
class DecodeTiles {
 public:
  DecodeTiles(const DecodeProblem& problem, const DecodeBlock& block, std::int64_t kv_head,
              Scratch& scratch)
      : problem_(problem),
        block_(block),
        kv_head_(kv_head),
        depth_(amx_depth(problem.head_dim())),
        columns_(amx_depth(problem.value_dim())),
        rows_(block.queries.size() * problem.group_size()),
        lanes_(round_up(rows_, kAmxDepth)),
        on_tiles_(uses_amx(problem.q.dtype)),
        pages_(problem, block.sequence),
        prefetch_(pages_) {
    take(scratch);
    find_tokens();
    pack_queries();
  }

  static std::int64_t scratch_floats(const DecodeProblem& problem, std::int64_t queries) {
    const std::int64_t lanes = round_up(queries * problem.group_size(), kAmxDepth);
    const std::int64_t depth = amx_depth(problem.head_dim());
    const std::int64_t columns = amx_depth(problem.value_dim());
    return Scratch::room_for(lanes * depth / 2) + Scratch::room_for(lanes * columns) +
           Scratch::room_for(kTokens * depth / 2) + Scratch::room_for(kTokens * columns / 2) +
           Scratch::room_for(kTokens * lanes) + Scratch::room_for(kTokens * lanes / 2) +
           3 * Scratch::room_for(lanes) + Scratch::room_for(kAmxRows * depth / 2);
  }

  bool compute(const AttentionState& partial) {
    for (std::int64_t first = tokens_.begin; first < tokens_.end; first += kTokens) {
      const Span tile{first, std::min(first + kTokens, tokens_.end)};
      count_ = round_up(tile.size(), kAmxDepth);
      if (!gather(tile)) return false;
      ask_for_next(tile);
      on_tiles_ ? score() : score_by_dots();
      weigh(tile);
      on_tiles_ ? add() : add_by_dots();
    }
    write(partial);
    return true;
  }

 private:
  void take(Scratch& scratch) {
    q_ = reinterpret_cast<std::uint32_t*>(scratch.take(lanes_ * depth_ / 2));
    o_ = scratch.take(lanes_ * columns_);
    k_ = reinterpret_cast<std::uint16_t*>(scratch.take(kTokens * depth_ / 2));
    v_ = reinterpret_cast<std::uint32_t*>(scratch.take(kTokens * columns_ / 2));
    s_ = scratch.take(kTokens * lanes_);
    p_ = reinterpret_cast<char*>(scratch.take(kTokens * lanes_ / 2));
    max_ = scratch.take(lanes_);
    sum_ = scratch.take(lanes_);
    factor_ = scratch.take(lanes_);
    halves_ = reinterpret_cast<std::uint16_t*>(scratch.take(kAmxRows * depth_ / 2));
    std::fill_n(o_, lanes_ * columns_, 0.0F);
    std::fill_n(max_, lanes_, kMinusInfinity);
    std::fill_n(sum_, lanes_, 0.0F);
  }

  // What each query sees, some query, and all.
  void find_tokens() {
    for (std::int64_t i = 0; i < block_.queries.size(); ++i) {
      seen_.push_back(visible_tokens(problem_, block_.sequence, block_.queries.begin + i));
    }
    all_see_ = seen_.front();
    for (const Span& span : seen_) {
      all_see_ = intersect(all_see_, span);
      if (span.empty()) continue;
      tokens_ = tokens_.empty()
                    ? span
                    : Span{std::min(tokens_.begin, span.begin), std::max(tokens_.end, span.end)};
    }
    tokens_ = intersect(tokens_, block_.tokens);
  }

  // Right operands [lanes / 16, depth / 32, 16 pairs, 16 lanes].
  void pack_queries() {
    for (std::int64_t lane = 0; lane < lanes_; lane += kAmxColumns) {
      for (std::int64_t r = 0; r < kAmxColumns; ++r) {
        const std::int64_t row = std::min(lane + r, rows_ - 1);
        const std::int64_t head = kv_head_ * problem_.group_size() + row % problem_.group_size();
        copy_half_row(
            static_cast<const std::uint16_t*>(problem_.q.data) +
                (block_.queries.begin + row / problem_.group_size()) * problem_.q.strides[0] +
                head * problem_.q.strides[1],
            problem_.head_dim(), halves_ + r * depth_);
      }
      transpose(reinterpret_cast<const float*>(halves_), depth_ / 2, kAmxColumns, depth_ / 2,
                reinterpret_cast<float*>(q_ + lane * depth_ / 2), kAmxColumns);
    }
  }

  // Keys one after the other, and values as right operands [columns / 16, 128 pairs, 16 columns],
  // with zeros behind the last token. Of each 32 columns the lower halves of the four quarters come
  // first. False when some value is not finite.
  bool gather(Span tile) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i largest = _mm512_setzero_si512();
    const bool latent = problem_.latent();
    for (std::int64_t i = 0; i < count_; i += 2) {
      const std::int64_t token = tile.begin + i;
      const bool has[2] = {token < tile.end, token + 1 < tile.end};
      const std::uint16_t* k[2] = {};
      const std::uint16_t* v[2] = {};
      for (int of = 0; of < 2; ++of) {
        const std::int64_t at = has[of] ? token + of : tile.begin;
        k[of] = pages_.row(problem_.k, at, kv_head_);
        v[of] = latent ? k[of] : pages_.row(problem_.v, at, kv_head_);
      }
      for (std::int64_t d = 0; d < depth_; d += kAmxDepth) {
        const __mmask32 columns = columns_left(problem_.head_dim() - d);
        for (int of = 0; of < 2; ++of) {
          _mm512_store_si512(k_ + (i + of) * depth_ + d,
                             _mm512_maskz_loadu_epi16(has[of] ? columns : 0, k[of] + d));
        }
      }
      for (std::int64_t d = 0; d < columns_; d += kAmxDepth) {
        const __mmask32 columns = columns_left(problem_.value_dim() - d);
        const __m512i even = _mm512_maskz_loadu_epi16(has[0] ? columns : 0, v[0] + d);
        const __m512i odd = _mm512_maskz_loadu_epi16(has[1] ? columns : 0, v[1] + d);
        largest = _mm512_max_epu16(largest, _mm512_and_si512(even, magnitude));
        largest = _mm512_max_epu16(largest, _mm512_and_si512(odd, magnitude));
        std::uint32_t* const to =
            v_ + d / kAmxColumns * kTokens / 2 * kAmxColumns + i / 2 * kAmxColumns;
        _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(to + kTokens / 2 * kAmxColumns, _mm512_unpackhi_epi16(even, odd));
      }
    }
    return halves_finite(largest);
  }

  // The next tile, of the next head at last, comes to L2 while this one is computed on.
  void ask_for_next(Span tile) {
    const bool more = tile.end < tokens_.end;
    const std::int64_t begin = more ? tile.end : tokens_.begin;
    const std::int64_t kv_head = more ? kv_head_ : kv_head_ + 1;
    const Span next{begin, std::min(begin + kTokens, tokens_.end)};
    prefetch_.start(kv_head < problem_.kv_heads() ? next : Span{}, kv_head);
  }

  // Tiles of a right or left operand that come from L2 next.
  static void bring(const void* tiles) {
    for (int line = 0; line < 16; ++line) {
      __builtin_prefetch(static_cast<const char*>(tiles) + 64 * line, 0, 3);
    }
  }

  // s_[token, lane] = k·q.
  void score() {
    const std::int64_t lane_words = kAmxColumns * depth_ / 2;
    const char* k = reinterpret_cast<const char*>(k_);
    const std::int64_t key_bytes = 2 * depth_;
    for (std::int64_t token = 0; token < count_; token += kAmxDepth) {
      for (std::int64_t lane = 0; lane < lanes_; lane += kAmxDepth) {
        const char* keys = k + token * key_bytes;
        const std::uint32_t* q = q_ + lane * depth_ / 2;
        amx_zero<0>();
        amx_zero<1>();
        amx_zero<2>();
        amx_zero<3>();
        for (std::int64_t d = 0; d < depth_; d += kAmxDepth) {
          prefetch_.lines<9>();
          bring(q + 2 * kTileWords);
          bring(q + 2 * kTileWords + lane_words);
          amx_load<4>(keys, key_bytes);
          amx_load<6>(q, 64);
          amx_multiply<0, 4, 6>();
          amx_load<7>(q + lane_words, 64);
          amx_multiply<1, 4, 7>();
          amx_load<5>(keys + kAmxRows * key_bytes, key_bytes);
          amx_multiply<2, 5, 6>();
          amx_multiply<3, 5, 7>();
          keys += 64;
          q += kTileWords;
        }
        float* s = s_ + token * lanes_ + lane;
        amx_store<0>(s, 4 * lanes_);
        amx_store<1>(s + kAmxColumns, 4 * lanes_);
        amx_store<2>(s + kAmxRows * lanes_, 4 * lanes_);
        amx_store<3>(s + kAmxRows * lanes_ + kAmxColumns, 4 * lanes_);
      }
    }
  }

  // The same: queries of 32 lanes stay in L1 while the keys pass by.
  void score_by_dots() {
    const std::int64_t key_bytes = 2 * depth_;
    // The next tile's lines, spread over the steps of this one.
    const std::int64_t row_bytes = key_bytes + (problem_.latent() ? 0 : 2 * columns_);
    const std::int64_t steps = lanes_ / kAmxDepth * (depth_ / kAmxDepth);  // of eight tokens
    const std::int64_t lines = (kDotRows * row_bytes / 64 + steps - 1) / steps;
    for (std::int64_t lane = 0; lane < lanes_; lane += kAmxDepth) {
      const char* q = reinterpret_cast<const char*>(q_ + lane * depth_ / 2);
      for (std::int64_t token = 0; token < count_; token += kDotRows) {
        const char* keys = reinterpret_cast<const char*>(k_) + token * key_bytes;
        multiply_by_dots<false>(
            {keys, key_bytes, 64, q, q + kAmxColumns * key_bytes}, depth_ / kAmxDepth,
            s_ + token * lanes_ + lane, lanes_,
            [this, lines] { prefetch_.share(lines, kAmxRows / kPairsBetween); });
      }
    }
  }

  void weigh(Span tile) {
    const bool full = tile.size() == count_ && intersect(all_see_, tile) == tile;
    if (problem_.soft_cap > 0.0F) cap();
    if (!full) mask(tile);
    bool kept = true;
    for (std::int64_t lane = 0; lane < lanes_; lane += kAmxColumns) kept &= softmax(lane);
    if (kept) return;
    for (std::int64_t row = 0; row < rows_; ++row) {
      if (factor_[row] == 1.0F) continue;
      const __m512 factor = _mm512_set1_ps(factor_[row]);
      float* o = o_ + row * columns_;
      for (std::int64_t d = 0; d < columns_; d += kLanes) {
        _mm512_store_ps(o + d, _mm512_mul_ps(factor, _mm512_load_ps(o + d)));
      }
    }
  }

  float scale() const { return problem_.soft_cap > 0.0F ? 1.0F : problem_.scale; }

  void cap() {
    const Floats d;
    const FloatVec outer = hn::Set(d, problem_.soft_cap);
    const FloatVec inner = hn::Set(d, problem_.scale / problem_.soft_cap);
    for (std::int64_t i = 0; i < count_ * lanes_; i += kLanes) {
      hn::Store(hn::Mul(outer, tanh(d, hn::Mul(hn::Load(d, s_ + i), inner))), d, s_ + i);
    }
  }

  void mask(Span tile) {
    for (std::int64_t i = 0; i < count_; ++i) {
      const std::int64_t token = tile.begin + i;
      if (token < tile.end && all_see_.contains(token)) continue;
      for (std::int64_t lane = 0; lane < lanes_; ++lane) {
        const std::int64_t row = std::min(lane, rows_ - 1);
        const Span seen = seen_[static_cast<std::size_t>(row / problem_.group_size())];
        if (token >= tile.end || !seen.contains(token)) s_[i * lanes_ + lane] = kMinusInfinity;
      }
    }
  }

  // Weights of sixteen lanes as left operands [lanes / 16, 8 steps, 16 lanes, 32 tokens]. Returns
  // whether what was added up before may stay as it is.
  bool softmax(std::int64_t lane) {
    const __m512 log2e = _mm512_set1_ps(kLog2E);
    const __m512 scale_of = _mm512_set1_ps(scale());
    const __m512 before = _mm512_load_ps(max_ + lane);
    __m512 largest = _mm512_set1_ps(kMinusInfinity);
    for (std::int64_t i = 0; i < count_; ++i) {
      largest = _mm512_max_ps(largest, _mm512_load_ps(s_ + i * lanes_ + lane));
    }
    const __m512 max = _mm512_max_ps(before, _mm512_mul_ps(largest, scale_of));
    const __m512 base2 = base2_max(FloatVec{max}).raw;
    const __m512 factor = exp2_of_weight(_mm512_fmsub_ps(before, log2e, base2));
    const __m512 to_base2 = _mm512_mul_ps(scale_of, log2e);
    __m512 sum = _mm512_mul_ps(_mm512_load_ps(sum_ + lane), factor);
    alignas(64) std::uint32_t pairs[kTileWords];
    for (std::int64_t step = 0; step < count_ / kAmxDepth; ++step) {
      const float* s = s_ + step * kAmxDepth * lanes_ + lane;
      for (std::int64_t i = 0; i < kAmxRows; ++i) {
        const __m512 lower = exp2_of_weight(_mm512_fmsub_ps(_mm512_load_ps(s), to_base2, base2));
        const __m512 upper =
            exp2_of_weight(_mm512_fmsub_ps(_mm512_load_ps(s + lanes_), to_base2, base2));
        sum = _mm512_add_ps(sum, _mm512_add_ps(lower, upper));
        _mm512_store_si512(pairs + i * kAmxColumns, pair_of(lower, upper));
        s += 2 * lanes_;
      }
      transpose(
          reinterpret_cast<const float*>(pairs), kAmxColumns, kAmxRows, kAmxColumns,
          reinterpret_cast<float*>(p_ + (lane / kAmxColumns * kTokenSteps + step) * kAmxBytes),
          kAmxColumns);
    }
    _mm512_store_ps(max_ + lane, max);
    _mm512_store_ps(sum_ + lane, sum);
    _mm512_store_ps(factor_ + lane, factor);
    return _mm512_cmp_ps_mask(factor, _mm512_set1_ps(1.0F), _CMP_NEQ_UQ) == 0;
  }

  // o_[lane, column] += P·V. Values of 32 columns stay in L1 while the weights pass by.
  void add() {
    const std::int64_t column_bytes = kTokens / 2 * kAmxColumns * 4;
    const std::int64_t lane_bytes = kTokenSteps * kAmxBytes;
    for (std::int64_t d = 0; d < columns_; d += kAmxDepth) {
      for (std::int64_t lane = 0; lane < lanes_; lane += kAmxDepth) {
        const char* p = p_ + lane / kAmxColumns * lane_bytes;
        const char* v = reinterpret_cast<const char*>(v_) + d / kAmxColumns * column_bytes;
        float* o = o_ + lane * columns_ + d;
        amx_load<0>(o, 4 * columns_);
        amx_load<1>(o + kAmxColumns, 4 * columns_);
        amx_load<2>(o + kAmxRows * columns_, 4 * columns_);
        amx_load<3>(o + kAmxRows * columns_ + kAmxColumns, 4 * columns_);
        for (std::int64_t step = 0; step < count_ / kAmxDepth; ++step) {
          bring(p + 2 * kAmxBytes);
          bring(p + 2 * kAmxBytes + lane_bytes);
          amx_load<4>(p, 64);
          amx_load<6>(v, 64);
          amx_multiply<0, 4, 6>();
          amx_load<7>(v + column_bytes, 64);
          amx_multiply<1, 4, 7>();
          amx_load<5>(p + lane_bytes, 64);
          amx_multiply<2, 5, 6>();
          amx_multiply<3, 5, 7>();
          p += kAmxBytes;
          v += kAmxBytes;
        }
        amx_store<0>(o, 4 * columns_);
        amx_store<1>(o + kAmxColumns, 4 * columns_);
        amx_store<2>(o + kAmxRows * columns_, 4 * columns_);
        amx_store<3>(o + kAmxRows * columns_ + kAmxColumns, 4 * columns_);
      }
    }
  }

  void add_by_dots() {
    const std::int64_t column_bytes = kTokens / 2 * kAmxColumns * 4;
    const std::int64_t lane_bytes = kTokenSteps * kAmxBytes;
    for (std::int64_t d = 0; d < columns_; d += kAmxDepth) {
      const char* v = reinterpret_cast<const char*>(v_) + d / kAmxColumns * column_bytes;
      for (std::int64_t lane = 0; lane < lanes_; lane += kDotRows) {
        const char* p = p_ + lane / kAmxRows * lane_bytes + lane % kAmxRows * 64;
        multiply_by_dots<true>({p, 64, kAmxBytes, v, v + column_bytes}, count_ / kAmxDepth,
                               o_ + lane * columns_ + d, columns_, [] {});
      }
    }
  }

  void write(const AttentionState& partial) const {
    for (std::int64_t row = 0; row < rows_; ++row) {
      const std::int64_t query = row / problem_.group_size();
      const std::int64_t head = kv_head_ * problem_.group_size() + row % problem_.group_size();
      const auto statistic = [&](const TensorView& view) -> float& {
        return static_cast<float*>(view.data)[statistic_offset(view, 0, head, query)];
      };
      statistic(partial.row_max) = max_[row];
      statistic(partial.row_sum) = sum_[row];
      float* o = static_cast<float*>(partial.accumulator.data) +
                 row_offset(partial.accumulator, 0, query, head);
      for (std::int64_t d = 0; d < columns_; d += kAmxDepth) put_in_order(row, d, o);
    }
  }

  // 32 columns, undoing gather()'s order.
  void put_in_order(std::int64_t row, std::int64_t d, float* to) const {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const float* from = o_ + row * columns_ + d;
    const __m512 lower = _mm512_load_ps(from);
    const __m512 upper = _mm512_load_ps(from + kAmxColumns);
    const __mmask32 columns = columns_left(problem_.value_dim() - d);
    _mm512_mask_storeu_ps(to + d, static_cast<__mmask16>(columns),
                          _mm512_permutex2var_ps(lower, first, upper));
    _mm512_mask_storeu_ps(to + d + kAmxColumns, static_cast<__mmask16>(columns >> 16),
                          _mm512_permutex2var_ps(lower, second, upper));
  }

  const DecodeProblem& problem_;
  const DecodeBlock& block_;
  std::int64_t kv_head_;
  std::int64_t depth_;    // of keys, a multiple of 32
  std::int64_t columns_;  // of values
  std::int64_t rows_;     // row r is query r / group, and head r % group of the group
  std::int64_t lanes_;    // rows, up to a multiple of 32: the last one is repeated
  bool on_tiles_;         // of the tile unit
  std::vector<Span> seen_;
  Span tokens_;
  Span all_see_;
  std::int64_t count_ = 0;  // of this tile's tokens, a multiple of 32
  PageRows pages_;
  PagePrefetch prefetch_;
  std::uint32_t* q_ = nullptr;
  float* o_ = nullptr;
  std::uint16_t* k_ = nullptr;
  std::uint32_t* v_ = nullptr;
  float* s_ = nullptr;
  char* p_ = nullptr;
  float* max_ = nullptr;
  float* sum_ = nullptr;
  float* factor_ = nullptr;
  std::uint16_t* halves_ = nullptr;
};

std::int64_t tiles_scratch_on_target(const DecodeProblem& problem, std::int64_t queries) {
  return DecodeTiles::scratch_floats(problem, queries);
}

bool tiles_on_target(const DecodeProblem& problem, const DecodeBlock& block,
                     const AttentionState& partial, Scratch& scratch) {
  const AmxScope amx(uses_amx(problem.q.dtype));
  for (std::int64_t kv_head = 0; kv_head < problem.kv_heads(); ++kv_head) {
    if (!scratch.reserve(DecodeTiles::scratch_floats(problem, block.queries.size()))) return false;
    if (!DecodeTiles(problem, block, kv_head, scratch).compute(partial)) return false;
  }
  return true;
}

#else

std::int64_t tiles_scratch_on_target(const DecodeProblem&, std::int64_t) { return 0; }

bool tiles_on_target(const DecodeProblem&, const DecodeBlock&, const AttentionState&, Scratch&) {
  return false;
}

#endif  // ANNULUS_AMX

bool tiles_fit_on_target(const DecodeProblem& problem, std::int64_t queries) {
  // With fewer rows the products wait for memory, whoever computes them, or lanes are left empty.
  constexpr std::int64_t kLeastRowsOfTiles = 12;
  constexpr std::int64_t kLeastRowsOfDots = 24;
  const std::int64_t rows = queries * problem.group_size();
  // Maxima are of products, before the scale.
  if (problem.soft_cap <= 0.0F && problem.scale <= 0.0F) return false;
  if (uses_amx(problem.q.dtype)) return rows >= kLeastRowsOfTiles;
  return ANNULUS_AMX == 1 && problem.q.dtype == DType::bf16 && cpu::has_bf16_dots() &&
         rows >= kLeastRowsOfDots;
}

}  // namespace
}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus::kernels {

HWY_EXPORT(tiles_scratch_on_target);
HWY_EXPORT(tiles_on_target);
HWY_EXPORT(tiles_fit_on_target);

bool decode_tiles_fit(const DecodeProblem& problem, std::int64_t queries) {
  return HWY_DYNAMIC_DISPATCH(tiles_fit_on_target)(problem, queries);
}

std::int64_t decode_tiles_scratch(const DecodeProblem& problem, std::int64_t queries) {
  return HWY_DYNAMIC_DISPATCH(tiles_scratch_on_target)(problem, queries);
}

bool decode_tiles(const DecodeProblem& problem, const DecodeBlock& block,
                  const AttentionState& partial, Scratch& scratch) {
  return HWY_DYNAMIC_DISPATCH(tiles_on_target)(problem, block, partial, scratch);
}

}  // namespace annulus::kernels
#endif  // HWY_ONCE
