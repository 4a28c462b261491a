// Decode attention in bf16 through the dot product of vectors and in f32, for processors whose L1
// does not hold the sums of all heads: values pass head by head of a tile, keys by two tokens of
// all heads.
#if defined(ANNULUS_CPU_DECODE_HEADS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DECODE_HEADS_INL
#undef ANNULUS_CPU_DECODE_HEADS_INL
#else
#define ANNULUS_CPU_DECODE_HEADS_INL
#endif

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/pair_quads-inl.hpp"

#if ANNULUS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Of kTile rows.
using RowAddresses = const char* const*;

/// Weights of a tile in bf16, [pair of tokens, row].
inline constexpr int kWeightPairs = kTile / 2 * kQuad;

/// `to` ← p, [4 tokens, row] a vector.
HWY_INLINE void store_weight_pairs(const FloatVec* p, std::uint32_t* to) {
  alignas(64) static constexpr std::uint16_t kOrder[32] = {
      0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
      16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  HWY_UNROLL(2)
  for (int i = 0; i < kWeightPairs / kLanes; ++i) {
    __m512i rounded;  // an instruction that Highway 1.0 has no target for
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(rounded) : "v"(p[2 * i + 1].raw), "v"(p[2 * i].raw));
    _mm512_store_si512(to + i * kLanes, _mm512_permutexvar_epi16(order, rounded));
  }
}

/// O in the order that pairs of two rows come in: the lower four columns of each block of eight,
/// then the upper ones.
struct RowsByBlocks : RowsPairs {
  static constexpr std::int64_t kStreams = 4;  // of memory, in different pages where they are small
  static constexpr int kTokens = 2;            // whose lines are multiplied at once
  static constexpr std::int64_t kFarBytes = 8192;
  // What is settled has left L2 meanwhile; weights in bf16 round more than sums of 1,024 tokens do.
  static constexpr std::int64_t kApartTiles = 256;
  static std::int64_t place(std::int64_t column) {
    return column % 8 / 4 * kLanes + column / 8 * 4 + column % 4;
  }
  static HWY_INLINE void widen(__m512i line, FloatVec* to) {
    const __m512i zero = _mm512_setzero_si512();
    to[0] = as_floats(_mm512_unpacklo_epi16(zero, line));
    to[1] = as_floats(_mm512_unpackhi_epi16(zero, line));
  }
  static HWY_INLINE void operands(__m512i even, __m512i odd, FloatVec* to) {
    to[0] = as_floats(_mm512_unpacklo_epi16(even, odd));
    to[1] = as_floats(_mm512_unpackhi_epi16(even, odd));
  }
  static HWY_INLINE void store_weights(const FloatVec* p, std::uint32_t* to) {
    store_weight_pairs(p, to);
  }
  // Weights of a tile times a factor for each row.
  static void lower_weights(FloatVec factor, std::uint32_t* to) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
    for (int i = 0; i < kWeightPairs; i += kLanes) {
      const __m512i pairs = _mm512_load_si512(to + i);
      const FloatVec even = hn::Mul(as_floats(_mm512_slli_epi32(pairs, 16)), factor);
      const FloatVec odd = hn::Mul(as_floats(_mm512_and_si512(pairs, upper)), factor);
      const __m512i half = _mm512_set1_epi32(0x8000);
      const __m512i low =
          _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even.raw), half), 16);
      const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd.raw), half);
      _mm512_store_si512(to + i, _mm512_or_si512(low, _mm512_and_si512(high, upper)));
    }
  }
};

/// Rows of f32, two lines of a token at once.
struct RowsFloats {
  static constexpr std::int64_t kBytes = 4;
  static constexpr std::int64_t kColumnsOfLine = kLanes;
  static constexpr std::int64_t kStreams = 2;  // rows are twice as long as those of bf16
  static constexpr int kTokens = 1;
  static constexpr std::int64_t kFarBytes = 16384;
  static constexpr std::int64_t kApartTiles = kSettledTiles;
  static std::int64_t query_stride(std::int64_t dim) { return round_up(dim, kLanes); }
  static void store_query(std::span<const float> row, float, float* to) {
    std::copy(row.begin(), row.end(), to);
  }
  static std::int64_t place(std::int64_t column) { return column; }
  static HWY_INLINE __m512i load(const char* row, std::int64_t column, std::int64_t columns) {
    const char* at = row + kBytes * column;
    const std::int64_t left = columns - column;
    if (left >= kLanes) return _mm512_loadu_si512(at);
    const auto lanes =
        static_cast<__mmask16>(left > 0 ? (1U << static_cast<unsigned>(left)) - 1U : 0U);
    return _mm512_maskz_loadu_epi32(lanes, at);
  }
  static HWY_INLINE FloatVec multiply(FloatVec a, FloatVec b, FloatVec sum) {
    return hn::MulAdd(a, b, sum);
  }
  static HWY_INLINE void widen(__m512i line, FloatVec* to) { to[0] = as_floats(line); }
  static HWY_INLINE void operands(__m512i first, __m512i second, FloatVec* to) {
    to[0] = as_floats(first);
    to[1] = as_floats(second);
  }
  static HWY_INLINE void store_weights(const FloatVec* p, std::uint32_t* to) {
    const Floats d;
    HWY_UNROLL(4)
    for (int i = 0; i < kTile * kQuad / kLanes; ++i) {
      hn::Store(p[i], d, reinterpret_cast<float*>(to) + i * kLanes);
    }
  }
  static void lower_weights(FloatVec factor, std::uint32_t* to) {
    const Floats d;
    auto* weights = reinterpret_cast<float*>(to);
    for (int i = 0; i < kTile * kQuad; i += kLanes) {
      hn::Store(hn::Mul(hn::Load(d, weights + i), factor), d, weights + i);
    }
  }
};

/// Line `i` of those that are asked for beside the lines of 32 columns: of kTile rows, in their
/// order.
template <class Rows, int kColumns>
HWY_INLINE const char* line_of(RowAddresses rows, std::int64_t column, int i) {
  constexpr int kParts = kColumns / kPair;
  if constexpr (kParts == 0) {
    return rows[i * Rows::kTokens / 2] + Rows::kBytes * column +
           (Rows::kTokens == 1 ? i % 2 * kLineBytes : 0);
  } else {
    constexpr int kLines = kColumns * Rows::kBytes / kLineBytes;
    return rows[column / kPair * (kTile / kParts) + i / kLines] + i % kLines * kLineBytes;
  }
}

/// o += p·V for a tile of a head that lies `head_bytes` behind the rows of head 0. Asks for the
/// lines of `ahead`, a row for each row of v, and once more for those of the next head.
template <class Rows, int kColumns>
HWY_INLINE void add_tile(RowAddresses v, std::int64_t head_offset, std::int64_t head_bytes,
                         std::int64_t any_columns, const std::uint32_t* HWY_RESTRICT p,
                         RowAddresses ahead, float* HWY_RESTRICT o) {
  const Floats d;
  const hn::RebindToUnsigned<Floats> du;
  constexpr bool kTwoRows = Rows::kTokens == 2;
  const std::int64_t columns = columns_of<kColumns>(any_columns);
  const std::int64_t o_stride = round_up(columns, kPair);
  HWY_UNROLL(1)
  for (std::int64_t column = 0; column < columns; column += kPair) {
    FloatVec sum[kQuad][2];
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      sum[r][0] = hn::Load(d, o + r * o_stride + column);
      sum[r][1] = hn::Load(d, o + r * o_stride + column + kLanes);
    }
    HWY_UNROLL(8)
    for (int i = 0; i < kTile / Rows::kTokens; ++i) {
      const char* first = v[i * Rows::kTokens] + head_offset;
      const char* second = kTwoRows ? v[2 * i + 1] + head_offset : first;
      const std::int64_t second_column = kTwoRows ? column : column + kLanes;
      FloatVec value[2];
      Rows::operands(Rows::load(first, column, columns), Rows::load(second, second_column, columns),
                     value);
      ask<Level::l2>(line_of<Rows, kColumns>(ahead, column, 2 * i));
      ask<Level::l2>(first + head_bytes + Rows::kBytes * column);
      HWY_UNROLL(4)
      for (int r = 0; r < kQuad; ++r) {
        const FloatVec weight = hn::BitCast(d, hn::Set(du, p[i * kQuad + r]));
        sum[r][0] = Rows::multiply(value[0], weight, sum[r][0]);
        sum[r][1] = Rows::multiply(value[1], weight, sum[r][1]);
        if (r == 1) ask<Level::l2>(line_of<Rows, kColumns>(ahead, column, 2 * i + 1));
        if (r == 2) ask<Level::l2>(second + head_bytes + Rows::kBytes * second_column);
      }
    }
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      hn::Store(sum[r][0], d, o + r * o_stride + column);
      hn::Store(sum[r][1], d, o + r * o_stride + column + kLanes);
    }
  }
}

/// Attention of a block. Sums of a head are in registers for a tile of values, which are read in
/// another order than they lie in: they are asked for a tile ahead, in the order of memory, and
/// again a head ahead, for what the processor forgot.
template <class Rows, int kColumns>
class DecodeHeads : PairQuads<Rows> {
  using Base = PairQuads<Rows>;
  using Base::kWeightVectors;
  using Base::problem_;
  using Base::quads_;
  using Base::quads_of_head_;
  using Base::sees_all;
  using typename Base::Tiles;

 public:
  DecodeHeads(const DecodeProblem& problem, const DecodeBlock& block, Scratch& scratch)
      : Base(problem, block, scratch),
        k_bytes_(problem.k.strides[2] * Rows::kBytes),
        near_(tokens_in(problem, kNearBytes, kTile / 2)),
        far_(tokens_in(problem, Rows::kFarBytes, kTile)),
        v_bytes_(problem.v.strides[2] * Rows::kBytes),
        ahead_(static_cast<std::size_t>((problem.kv_heads() + 1) * kTile)) {
    for (std::size_t i = 0; i < quads_.size(); ++i) products_.push_back(scratch.take(2 * kScores));
  }

  static std::int64_t scratch_floats(const DecodeProblem& problem, std::int64_t queries) {
    const std::int64_t quads = (queries * problem.group_size() + kQuad - 1) / kQuad;
    return problem.kv_heads() * quads * Scratch::room_for(2 * kScores);
  }

  void compute(std::span<const AttentionState> partials) {
    this->each_tile(partials, Rows::kApartTiles, [this](const Tiles& tiles) { pass(tiles); });
  }

 private:
  static constexpr std::int64_t kStreams = Rows::kStreams;
  // Keys of a stream that fill Rows::kFarBytes are asked for ahead of their use, and again.
  static constexpr std::int64_t kNearBytes = 2048;

  static std::int64_t tokens_in(const DecodeProblem& problem, std::int64_t bytes,
                                std::int64_t most) {
    const std::int64_t token = Rows::kBytes * problem.kv_heads() * problem.head_dim();
    return std::clamp<std::int64_t>(kStreams * (bytes / token), kStreams, most);
  }

  // After the values of each quad, its share of the pairs of tokens whose keys are multiplied.
  HWY_NOINLINE void pass(const Tiles& tiles) {
    for (std::size_t i = 0; i < quads_.size(); ++i) std::swap(quads_[i].s, products_[i]);
    find_ahead(tiles);
    const bool whole = tiles.values.count == kTile && sees_all(tiles.values);
    const auto quads = static_cast<std::int64_t>(quads_.size());
    std::int64_t token = 0;
    for (std::int64_t i = 0; i < quads; ++i) {
      if (whole) {
        add_whole(i, tiles);
      } else if (tiles.values.count > 0) {
        add_some(i, tiles.values);
      } else {
        ask_for_first(i);
      }
      const std::int64_t end = std::min(kTile * (i + 1) / quads, tiles.keys.count);
      for (; token < end; token += 2) multiply_keys(tiles, token);
    }
  }

  HWY_INLINE void add_whole(std::int64_t i, const Tiles& tiles) {
    Quad& quad = quads_[static_cast<std::size_t>(i)];
    FloatVec p[kWeightVectors];
    this->weigh(quad, tiles.values, true, p);
    Rows::store_weights(p, weights_);
    const std::int64_t head = i / quads_of_head_;
    add_tile<Rows, kColumns>(tiles.values.v.data(), head * v_bytes_, v_bytes_, problem_.value_dim(),
                             opaque(weights_), ahead_.data() + (head + 1) * kTile, quad.o);
  }

  HWY_NOINLINE void add_some(std::int64_t i, const Tile& values) {
    Quad& quad = quads_[static_cast<std::size_t>(i)];
    FloatVec p[kWeightVectors];
    this->weigh(quad, values, false, p);
    Base::store_weights(p, quad.s);
    const std::int64_t offset = i / quads_of_head_ * v_bytes_;
    for (std::int64_t token = 0; token < values.count; ++token) {
      add_kept<Rows>(values.v[static_cast<std::size_t>(token)] + offset, problem_.value_dim(),
                     quad.s + token / 2 * kLanes + token % 2 * kQuad, quad.o);
    }
  }

  // The rows of V that are asked for, a tile's heads in the order of memory: those of the keys'
  // tile, and what the last head asks for of the next tile.
  HWY_INLINE void find_ahead(const Tiles& tiles) {
    const hn::FixedTag<std::uint64_t, kStreams> d;
    const auto head_bytes = hn::Set(d, static_cast<std::uint64_t>(v_bytes_));
    const std::int64_t heads = problem_.kv_heads();
    auto* to = reinterpret_cast<std::uint64_t*>(ahead_.data());
    const std::uint64_t* end = to + ahead_.size();
    for (const Tile* tile : {&tiles.keys, &tiles.next}) {
      for (std::size_t token = 0; token < kTile && to < end; token += kStreams) {
        auto rows = hn::LoadU(d, reinterpret_cast<const std::uint64_t*>(&tile->v[token]));
        for (std::int64_t head = 0; head < heads && to < end; ++head, to += kStreams) {
          hn::StoreU(rows, d, to);
          rows = hn::Add(rows, head_bytes);
        }
      }
    }
  }

  // The first tile's values, while its keys are multiplied.
  HWY_NOINLINE void ask_for_first(std::int64_t i) const {
    const auto first = static_cast<std::size_t>(i / quads_of_head_ * kTile);
    for (std::size_t j = first; j < first + kTile; ++j) {
      const char* row = ahead_[j];
      for (std::int64_t column = 0; column < problem_.value_dim(); column += Rows::kColumnsOfLine) {
        ask<Level::l2>(row + Rows::kBytes * column);
      }
    }
  }

  static HWY_INLINE const Tile& tile_of(const Tiles& tiles, std::int64_t token) {
    return token < kTile ? tiles.keys : tiles.next;
  }

  // The rows of two keys, some tokens after one of the tile.
  static HWY_INLINE RowPair rows_at(const Tiles& tiles, std::int64_t token) {
    const auto i = static_cast<std::size_t>(token % kTile);
    return {tile_of(tiles, token).k[i], tile_of(tiles, token).k[i + 1]};
  }

  // Under a hypervisor an address may be translated by 4 KB, two tokens, for 75 cycles, and nothing
  // retires behind what is asked for meanwhile: all streams' rows are translated at a time.
  static HWY_INLINE void ask_for_pages(const Tiles& tiles, std::int64_t key, std::int64_t value) {
    for (std::int64_t i = 0; i < kStreams; ++i) {
      ask<Level::l2>(tile_of(tiles, key).k[static_cast<std::size_t>(key % kTile + i)]);
      ask<Level::l2>(tile_of(tiles, value).v[static_cast<std::size_t>(value % kTile + i)]);
    }
  }

  HWY_INLINE void multiply_keys(const Tiles& tiles, std::int64_t token) {
    if (token % kStreams == 0) ask_for_pages(tiles, token + far_, token + kTile / 2);
    RowPair k = rows_at(tiles, token);
    RowPair near = rows_at(tiles, token + near_);
    RowPair far = rows_at(tiles, token + far_);
    const auto step_on = [this](RowPair& rows) HWY_ATTR {
      rows.even += k_bytes_;
      rows.odd += k_bytes_;
    };
    std::size_t i = 0;
    for (std::int64_t head = 0; head < problem_.kv_heads(); ++head) {
      const auto ask_beside = [&](std::int64_t column, int step) HWY_ATTR {
        if (step == 0) ask<Level::l2>(far.even + Rows::kBytes * column);
        if (step == 1) ask<Level::l2>(near.even + Rows::kBytes * column);
        if (step == 2) ask<Level::l2>(far.odd + Rows::kBytes * column);
        if (step == 3) ask<Level::l2>(near.odd + Rows::kBytes * column);
      };
      for (std::int64_t j = 0; j < quads_of_head_; ++j, ++i) {
        score_pair<Rows, kColumns>(k, problem_.head_dim(), quads_[i].q, ask_beside,
                                   products_[i] + token / 2 * kLanes);
      }
      step_on(k);
      step_on(near);
      step_on(far);
    }
  }

  std::int64_t k_bytes_;  // from a head to the next
  std::int64_t v_bytes_;
  std::int64_t near_;  // tokens between what is asked for and what is read
  std::int64_t far_;
  std::vector<const char*> ahead_;
  // Of one quad, in the bits of f32 or pairs of bf16.
  alignas(64) std::uint32_t weights_[kTile * kQuad];
  std::vector<float*> products_;  // of each quad with the keys; s has those of the values' tokens
};

template <class Rows>
void decode_heads(const DecodeProblem& problem, const DecodeBlock& block,
                  std::span<const AttentionState> partials, Scratch& scratch) {
  const auto has = [&](std::int64_t columns) {
    return problem.head_dim() == columns && problem.value_dim() == columns;
  };
  if (has(128)) return DecodeHeads<Rows, 128>(problem, block, scratch).compute(partials);
  if (has(64)) return DecodeHeads<Rows, 64>(problem, block, scratch).compute(partials);
  DecodeHeads<Rows, 0>(problem, block, scratch).compute(partials);
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_PAIRS

#endif  // ANNULUS_CPU_DECODE_HEADS_INL
