// Decode attention in bf16 through the dot product of vectors and in f32, for processors whose L1
// holds little: the keys of some tokens, then the values of others, each in the order of memory.
#if defined(ANNULUS_CPU_DECODE_STREAM_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DECODE_STREAM_INL
#undef ANNULUS_CPU_DECODE_STREAM_INL
#else
#define ANNULUS_CPU_DECODE_STREAM_INL
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "hwy/highway.h"
#include "kernels/cpu/decode_heads-inl.hpp"
#include "kernels/cpu/pair_quads-inl.hpp"

#if ANNULUS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Places in the stream ahead of what is read: the processor forgets some of what it is asked for,
/// and what was asked for again arrives. While one that did not come in time is waited for nothing
/// else is asked for: the middle place of keys is asked for twice, a product apart.
struct Ahead {
  const char* far = nullptr;
  const char* middle = nullptr;
  const char* near = nullptr;

  HWY_INLINE void ask_far(std::int64_t at) const { ask<Level::l2>(far + at); }
  HWY_INLINE void ask_middle(std::int64_t at) const { ask<Level::l2>(middle + at); }
  HWY_INLINE void ask_near(std::int64_t at) const { ask<Level::l2>(near + at); }
  HWY_INLINE void step_on(std::int64_t bytes) {
    far += bytes;
    middle += bytes;
    near += bytes;
  }
};

/// Keeps a vector in its register: the compiler would load it again for each use.
HWY_INLINE void hold(FloatVec& vector) { asm volatile("" : "+v"(vector.raw)); }

/// Products of a quad with two keys, in parts, as score_pair() does. Four lines of a key are read
/// before those of the other, and as many lines are asked for as are read.
template <class Rows, int kColumns>
HWY_INLINE void score_two(const RowPair& k, const Ahead& ahead, const float* HWY_RESTRICT q,
                          float* HWY_RESTRICT x) {
  const Floats d;
  constexpr std::int64_t kLines = std::min<std::int64_t>(kColumns / Rows::kColumnsOfLine, 4);
  const std::int64_t q_stride = Rows::query_stride(kColumns);
  FloatVec even[kQuad];
  FloatVec odd[kQuad];
  HWY_UNROLL(4)
  for (int r = 0; r < kQuad; ++r) even[r] = odd[r] = hn::Zero(d);
  HWY_UNROLL(2)
  for (std::int64_t column = 0; column < kColumns; column += kLines * Rows::kColumnsOfLine) {
    FloatVec key[2][kLines];
    HWY_UNROLL(2)
    for (int token = 0; token < 2; ++token) {
      HWY_UNROLL(4)
      for (std::int64_t i = 0; i < kLines; ++i) {
        key[token][i] = as_floats(
            Rows::load(token == 0 ? k.even : k.odd, column + i * Rows::kColumnsOfLine, kColumns));
        hold(key[token][i]);
      }
    }
    HWY_UNROLL(4)
    for (std::int64_t i = 0; i < kLines; ++i) {
      HWY_UNROLL(4)
      for (int r = 0; r < kQuad; ++r) {
        const std::int64_t at = column + i * Rows::kColumnsOfLine;
        const FloatVec of_q = hn::Load(d, q + r * q_stride + at * Rows::kBytes / 4);
        even[r] = Rows::multiply(key[0][i], of_q, even[r]);
        odd[r] = Rows::multiply(key[1][i], of_q, odd[r]);
        const std::int64_t byte = 2 * Rows::kBytes * at + r / 2 * kLineBytes;
        if (r % 2 == 0) ahead.ask_far(byte);
        ahead.ask_middle(byte);
        if (r % 2 == 1) ahead.ask_near(byte);
      }
    }
  }
  const FloatVec a = block_sums(even);
  const FloatVec b = block_sums(odd);
  hn::Store(hn::Add(hn::ConcatLowerLower(d, b, a), hn::ConcatUpperUpper(d, b, a)), d, x);
}

/// Tokens whose values are added to O at a time: four operands for each load and store of a sum.
template <class Rows>
inline constexpr std::int64_t kPassTokens = kQuadKeys* Rows::kTokens;

/// Operands of the values of kPassTokens tokens in kPair columns.
template <class Rows, int kColumns>
HWY_INLINE void load_values(const char* const* HWY_RESTRICT v, std::int64_t offset,
                            std::int64_t column, FloatVec value[kQuadKeys][2]) {
  constexpr bool kTwoRows = Rows::kTokens == 2;
  HWY_UNROLL(4)
  for (int i = 0; i < kQuadKeys; ++i) {
    const char* row = v[i * Rows::kTokens] + offset;
    FloatVec first = as_floats(Rows::load(row, column, kColumns));
    hold(first);
    if constexpr (kTwoRows) row = v[2 * i + 1] + offset;
    FloatVec second = as_floats(Rows::load(row, kTwoRows ? column : column + kLanes, kColumns));
    hold(second);
    Rows::operands(_mm512_castps_si512(first.raw), _mm512_castps_si512(second.raw), value[i]);
  }
}

/// o += p·V for the values of kPassTokens tokens of a head. Asks for as many lines as it reads in
/// the order of memory, of four heads of a token a place of `ahead`, and once more for those of the
/// next pass, which it would read next but for the other heads.
template <class Rows, int kColumns>
HWY_INLINE void add_pass(const char* const* HWY_RESTRICT v, std::int64_t offset,
                         const Ahead* HWY_RESTRICT ahead, const std::uint32_t* HWY_RESTRICT p,
                         float* HWY_RESTRICT o) {
  const Floats d;
  const hn::RebindToUnsigned<Floats> du;
  constexpr std::int64_t kRowLines = kPair * Rows::kBytes / kLineBytes;
  constexpr std::int64_t kLines = kPassTokens<Rows> * kRowLines;
  constexpr std::int64_t kPlaceBytes = kQuadKeys * kColumns * Rows::kBytes;
  const std::int64_t o_stride = round_up(kColumns, kPair);
  FloatVec weight[kQuadKeys][kQuad];
  HWY_UNROLL(4)
  for (int i = 0; i < kQuadKeys; ++i) {
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      weight[i][r] = hn::BitCast(d, hn::Set(du, p[i * kQuad + r]));
      hold(weight[i][r]);
    }
  }
  HWY_UNROLL(4)
  for (std::int64_t column = 0; column < kColumns; column += kPair) {
    FloatVec value[kQuadKeys][2];
    load_values<Rows, kColumns>(v, offset, column, value);
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      float* at = o + r * o_stride + column;
      FloatVec sum[2] = {hn::Load(d, at), hn::Load(d, at + kLanes)};
      HWY_UNROLL(4)
      for (int i = 0; i < kQuadKeys; ++i) {
        sum[0] = Rows::multiply(value[i][0], weight[i][r], sum[0]);
        sum[1] = Rows::multiply(value[i][1], weight[i][r], sum[1]);
      }
      HWY_UNROLL(2)
      for (std::int64_t i = 0; i < kLines / kQuad; ++i) {
        const std::int64_t line = r * kLines / kQuad + i;
        const std::int64_t byte = (column / kPair * kLines + line) * kLineBytes;
        ahead[byte / kPlaceBytes].ask_far(byte % kPlaceBytes);
        ahead[byte / kPlaceBytes].ask_middle(byte % kPlaceBytes);
        ask<Level::l2>(v[kPassTokens<Rows> + line / kRowLines] + offset + column * Rows::kBytes +
                       line % kRowLines * kLineBytes);
      }
      hn::Store(sum[0], d, at);
      hn::Store(sum[1], d, at + kLanes);
    }
  }
}

/// Attention of a block. The keys of a run of tokens are multiplied while the run before is
/// weighed; then the values of that one are added. Each is one stream of memory, which this kind of
/// processor follows best, and O stays in L1.
template <class Rows, int kColumns>
class DecodeStream : PairQuads<Rows> {
  using Base = PairQuads<Rows>;
  using Base::kWeightVectors;
  using Base::problem_;
  using Base::quads_;
  using Base::sees_all;
  using Base::tokens_;

 public:
  DecodeStream(const DecodeProblem& problem, const DecodeBlock& block, Scratch& scratch)
      : Base(problem, block, scratch),
        far_(tokens_ahead(problem)),
        products_(scratch.take(run_floats())),
        scores_(scratch.take(run_floats())),
        weights_(reinterpret_cast<std::uint32_t*>(scratch.take(run_floats() / 2))) {}

  static std::int64_t scratch_floats(const DecodeProblem& problem, std::int64_t queries) {
    const std::int64_t quads = (queries * problem.group_size() + kQuad - 1) / kQuad;
    return problem.kv_heads() * quads * 5 * kRunTiles * kScores;
  }

  void compute(std::span<const AttentionState> partials) {
    std::array<Run, 3> runs;  // of V, of K, and the next, in turn
    find(tokens_.begin, runs[1]);
    std::int64_t unsettled = 0;
    for (std::size_t i = 0;; i = (i + 1) % 3) {
      const Run& values = runs[i];
      const Run& keys = runs[(i + 1) % 3];
      Run& next = runs[(i + 2) % 3];
      if (values.count == 0 && keys.count == 0) return;
      find(keys.first + keys.count, next);
      std::swap(products_, scores_);
      pass_keys(values, keys, next);
      if (values.count == 0) continue;
      pass_values(values);
      unsettled += kRunTiles;
      if (this->ends_part(values)) {
        this->write_part(values, partials);
        unsettled = 0;
      } else if (unsettled >= Rows::kApartTiles) {
        this->settle();
        unsettled = 0;
      }
    }
  }

 private:
  static constexpr std::int64_t kHeadBytes = kColumns * Rows::kBytes;
  static constexpr std::int64_t kRunTiles = 4;
  static constexpr std::int64_t kRunTokens = kRunTiles * kTile;
  static constexpr std::int64_t kFarBytes = 32768;
  static constexpr std::int64_t kMostAhead = kTile;
  static constexpr std::size_t kNear = kQuadKeys;  // tokens, beyond those that are read

  // Tokens of a run, and addresses of as many behind it as are asked for beside the last ones.
  struct Run : TokenRange {
    std::array<const char*, kRunTokens + kMostAhead + kQuadKeys> k{};
    std::array<const char*, kRunTokens + kMostAhead + kQuadKeys> v{};
  };

  static std::size_t tokens_ahead(const DecodeProblem& problem) {
    const std::int64_t token = Rows::kBytes * problem.kv_heads() * problem.head_dim();
    return static_cast<std::size_t>(
        std::clamp<std::int64_t>(kFarBytes / token, 2 * kQuadKeys, kMostAhead));
  }

  void find(std::int64_t first, Run& run) const {
    run.first = first;
    run.count = std::clamp<std::int64_t>(tokens_.end - first, 0, kRunTokens);
    const std::int64_t found =
        std::clamp<std::int64_t>(tokens_.end - first, 0, kRunTokens + kMostAhead);
    this->find_run({first, first + found}, 0, 1, run);
    const auto* nothing = static_cast<const char*>(problem_.q.data);
    for (auto i = static_cast<std::size_t>(found); i < run.k.size(); ++i) {
      run.k[i] = i > 0 ? run.k[i - 1] : nothing;
      run.v[i] = i > 0 ? run.v[i - 1] : nothing;
    }
  }

  // Products and scores of a run: of a tile of a quad, kTile / 2 vectors of pairs of tokens.
  std::int64_t run_floats() const {
    return static_cast<std::int64_t>(quads_.size()) * kRunTiles * 2 * kScores;
  }

  std::int64_t place(std::int64_t tile, std::size_t quad) const {
    return tile * static_cast<std::int64_t>(quads_.size()) + static_cast<std::int64_t>(quad);
  }
  std::uint32_t* weights(std::int64_t tile, std::size_t quad) const {
    return weights_ + place(tile, quad) * kScores;
  }

  static TokenRange tile_of(const Run& run, std::int64_t tile) {
    return {run.first + tile * kTile, std::clamp<std::int64_t>(run.count - tile * kTile, 0, kTile)};
  }
  bool whole(const TokenRange& tile) const { return tile.count == kTile && sees_all(tile); }

  HWY_NOINLINE void pass_keys(const Run& values, const Run& keys, const Run& next) {
    // Far apart in memory, each costs a walk through tables that are not in the caches: all at once
    // they take as long as one.
    for (std::size_t token = 0; token < kRunTokens; token += kTile) {
      ask<Level::l2>(next.k[token]);
      ask<Level::l2>(next.v[token]);
    }
    const auto quads = static_cast<std::int64_t>(quads_.size());
    const std::int64_t tiles = (values.count + kTile - 1) / kTile;
    std::int64_t weighed = 0;
    for (std::int64_t token = 0; token < kRunTokens; token += 2) {
      for (; weighed < tiles * quads * (token + 2) / kRunTokens; ++weighed) {
        weigh_tile(values, weighed / quads, static_cast<std::size_t>(weighed % quads));
      }
      if (token < keys.count) multiply_two(keys, static_cast<std::size_t>(token));
    }
  }

  // Asks in the order of memory, in which the heads of a token lie before those of the next.
  HWY_INLINE void multiply_two(const Run& keys, std::size_t token) {
    RowPair k{keys.k[token], keys.k[token + 1]};
    const auto in_run = static_cast<std::int64_t>(token);
    float* x = products_ + place(in_run / kTile, 0) * 2 * kScores + in_run % kTile / 2 * kLanes;
    const Quad* quad = quads_.data();
    for (std::size_t row = 0; row < 2; ++row) {
      const char* const* rows = &keys.k[token + row];
      Ahead ahead{rows[far_], rows[far_ / 2], rows[kNear]};
      for (std::int64_t i = 0; i < problem_.kv_heads() / 2; ++i, ++quad, x += 2 * kScores) {
        score_two<Rows, kColumns>(k, ahead, quad->q, x);
        k.even += kHeadBytes;
        k.odd += kHeadBytes;
        ahead.step_on(2 * kHeadBytes);
      }
    }
  }

  HWY_NOINLINE void weigh_tile(const Run& run, std::int64_t tile, std::size_t i) {
    const Floats d;
    Quad& quad = quads_[i];
    const TokenRange tokens = tile_of(run, tile);
    quad.s = scores_ + place(tile, i) * 2 * kScores;
    const FloatVec before = hn::Load(d, quad.max);
    FloatVec p[kWeightVectors];
    const bool is_whole = whole(tokens);
    this->weigh(quad, tokens, is_whole, p);
    if (is_whole) {
      Rows::store_weights(p, weights(tile, i));
    } else {
      Base::store_weights(p, quad.s);
    }
    const FloatVec max = hn::Load(d, quad.max);
    if (tile > 0 && !hn::AllTrue(d, hn::Eq(before, max))) lower_weights(run, tile, i, before, max);
  }

  // The weights of a run's tiles before one that raised the maximum: they are not in O yet, which
  // was brought down with the other sums.
  HWY_NOINLINE void lower_weights(const Run& run, std::int64_t tiles, std::size_t i,
                                  FloatVec before, FloatVec max) {
    const Floats d;
    const FloatVec factor = exp2(d, hn::Sub(hn::Mul(before, hn::Set(d, kLog2E)), base2_max(max)));
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      if (whole(tile_of(run, tile))) {
        Rows::lower_weights(factor, weights(tile, i));
        continue;
      }
      float* s = scores_ + place(tile, i) * 2 * kScores;
      for (std::int64_t j = 0; j < 2 * kScores; j += kLanes) {
        hn::Store(hn::Mul(hn::Load(d, s + j), factor), d, s + j);
      }
    }
  }

  HWY_NOINLINE void pass_values(const Run& run) {
    for (std::int64_t token = 0; token < run.count; token += kTile) {
      const TokenRange tile = tile_of(run, token / kTile);
      if (whole(tile)) {
        for (std::int64_t i = 0; i < kTile; i += kPassTokens<Rows>) add_whole(run, token + i);
      } else {
        for (std::int64_t i = 0; i < tile.count; ++i) add_some(run, token + i);
      }
    }
  }

  HWY_INLINE void add_whole(const Run& run, std::int64_t token) {
    constexpr std::int64_t kPlaceBytes = kQuadKeys * kHeadBytes;
    const auto first = static_cast<std::size_t>(token);
    const std::uint32_t* p = weights(token / kTile, 0) + token % kTile / Rows::kTokens * kQuad;
    const char* const* rows = &run.v[first];  // of what is asked for
    std::int64_t in_row = 0;
    std::int64_t offset = 0;
    for (const Quad& quad : quads_) {
      Ahead ahead[kPassTokens<Rows> / kQuadKeys];
      for (Ahead& place : ahead) {
        place = {rows[far_] + in_row, rows[far_ * 3 / 4] + in_row, nullptr};
        in_row += kPlaceBytes;
        if (in_row < problem_.kv_heads() * kHeadBytes) continue;
        in_row = 0;
        ++rows;
      }
      add_pass<Rows, kColumns>(&run.v[first], offset, ahead, opaque(p), quad.o);
      offset += kHeadBytes;
      p += kScores;
    }
  }

  HWY_NOINLINE void add_some(const Run& run, std::int64_t token) {
    const std::int64_t in_tile = token % kTile;
    for (std::size_t i = 0; i < quads_.size(); ++i) {
      const float* p = scores_ + place(token / kTile, i) * 2 * kScores + in_tile / 2 * kLanes +
                       in_tile % 2 * kQuad;
      const std::int64_t offset = static_cast<std::int64_t>(i) * kHeadBytes;
      add_kept<Rows>(run.v[static_cast<std::size_t>(token)] + offset, problem_.value_dim(), p,
                     quads_[i].o);
    }
  }

  std::size_t far_;  // tokens between what is asked for and what is read
  float* products_;  // of the keys' run
  float* scores_;    // of the values' run
  std::uint32_t* weights_;
};

/// Whether the heads of a token lie next to each other and are long enough to make a stream, and O
/// of all rows stays in an L1 of 32 KB beside weights and lines.
template <class Rows>
bool streams(const DecodeProblem& problem, const DecodeBlock& block) {
  constexpr std::int64_t kMostFloats = std::int64_t{4} << 10;
  constexpr std::int64_t kLeastToken = 1024;
  const std::int64_t heads = problem.kv_heads();
  const std::int64_t columns = problem.head_dim();
  return block.queries.size() * problem.group_size() <= kQuad && heads % kQuadKeys == 0 &&
         (columns == 64 || columns == 128) && problem.value_dim() == columns &&
         problem.k.strides[2] == columns && problem.v.strides[2] == columns &&
         heads * kQuad * columns <= kMostFloats && heads * columns * Rows::kBytes >= kLeastToken;
}

template <class Rows>
void decode_stream(const DecodeProblem& problem, const DecodeBlock& block,
                   std::span<const AttentionState> partials, Scratch& scratch) {
  if (problem.head_dim() == 128) {
    DecodeStream<Rows, 128>(problem, block, scratch).compute(partials);
  } else {
    DecodeStream<Rows, 64>(problem, block, scratch).compute(partials);
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_PAIRS

#endif  // ANNULUS_CPU_DECODE_STREAM_INL
