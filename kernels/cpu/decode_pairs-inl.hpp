// Decode attention in bf16 through the dot product of vectors, for processors that have it at full
// rate: keys and values pass by two tokens at a time, all heads of them, as they lie in memory.
#if defined(ANNULUS_CPU_DECODE_PAIRS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DECODE_PAIRS_INL
#undef ANNULUS_CPU_DECODE_PAIRS_INL
#else
#define ANNULUS_CPU_DECODE_PAIRS_INL
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/pair_quads-inl.hpp"

#if ANNULUS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// O in the order of columns of RowsBf16: the even ones of a line, then the odd ones.
struct RowsByParity : RowsPairs {
  static constexpr std::int64_t kStreams = 1;
  static std::int64_t place(std::int64_t column) { return RowsBf16::place(column); }
  static HWY_INLINE void widen(__m512i line, FloatVec* to) {
    to[0] = FloatVec{_mm512_castsi512_ps(_mm512_slli_epi32(line, 16))};
    to[1] = FloatVec{_mm512_castsi512_ps(
        _mm512_and_si512(line, _mm512_set1_epi32(static_cast<int>(0xffff0000U))))};
  }
};

/// o += p·V for kLines lines of columns of two tokens, p[token, row]. Asks for as many lines as it
/// reads.
template <int kLines>
HWY_INLINE void add_pair_columns(const RowPair& v, std::int64_t column, std::int64_t columns,
                                 const float* HWY_RESTRICT p, const char* ahead,
                                 float* HWY_RESTRICT o, std::int64_t o_stride) {
  const Floats d;
  constexpr int kVectors = 2 * kLines;
  FloatVec even[kVectors];
  FloatVec odd[kVectors];
  HWY_UNROLL(2)
  for (int line = 0; line < kLines; ++line) {
    const std::int64_t at = column + line * kLineColumns;
    RowsByParity::widen(load_line(v.even, at, columns), even + 2 * line);
    RowsByParity::widen(load_line(v.odd, at, columns), odd + 2 * line);
  }
  HWY_UNROLL(4)
  for (int r = 0; r < kQuad; ++r) {
    if (r < 2 * kLines) ask<Level::l1>(ahead + r * kLineBytes);
    const FloatVec of_even = hn::Set(d, p[r]);
    const FloatVec of_odd = hn::Set(d, p[kQuad + r]);
    float* at = o + r * o_stride + column;
    FloatVec sum[kVectors];
    HWY_UNROLL(4)
    for (int c = 0; c < kVectors; ++c) {
      sum[c] = hn::MulAdd(of_even, even[c], hn::Load(d, at + c * kLanes));
    }
    HWY_UNROLL(4)
    for (int c = 0; c < kVectors; ++c) {
      hn::Store(hn::MulAdd(of_odd, odd[c], sum[c]), d, at + c * kLanes);
    }
  }
}

template <int kColumns>
HWY_INLINE void add_pair(const RowPair& v, std::int64_t any_columns, const float* HWY_RESTRICT p,
                         const char* ahead, float* HWY_RESTRICT o) {
  const std::int64_t columns = columns_of<kColumns>(any_columns);
  const std::int64_t o_stride = round_up(columns, kPair);
  ahead = opaque(ahead);
  std::int64_t column = 0;
  HWY_UNROLL(1)
  for (; column + 2 * kLineColumns <= columns; column += 2 * kLineColumns) {
    add_pair_columns<2>(v, column, columns, p, ahead, o, o_stride);
    ahead += 4 * kLineBytes;
  }
  for (; column < columns; column += kLineColumns) {
    add_pair_columns<1>(v, column, columns, p, ahead, o, o_stride);
    ahead += 2 * kLineBytes;
  }
}

/// Attention of a block, keys and values head by head of two tokens: both streams of memory move on
/// evenly, each line is asked for a few kilobytes before it is read, and the sums of all heads stay
/// in L1.
template <int kColumns>
class DecodePairs : PairQuads<RowsByParity> {
 public:
  DecodePairs(const DecodeProblem& problem, const DecodeBlock& block, Scratch& scratch)
      : PairQuads(problem, block, scratch), k_(stream_of(problem.k)), v_(stream_of(problem.v)) {}

  void compute(std::span<const AttentionState> partials) {
    each_tile(partials, kSettledTiles, [this](const Tiles& tiles) {
      if (tiles.values.count == kTile && sees_all(tiles.values) && tiles.keys.count == kTile) {
        pass_whole(tiles);
      } else {
        pass_some(tiles);
      }
    });
  }

 private:
  // Tokens that fill this are asked for ahead of their use, of K and of V each. What is in use and
  // what is on its way, Q and O share 48 KB of L1.
  static constexpr std::int64_t kAheadBytes = 4096;

  // How the heads of a token follow each other.
  struct Stream {
    std::int64_t columns = 0;
    std::int64_t head_bytes = 0;  // from a head to the next
    std::int64_t ahead = 0;       // tokens between what is asked for and what is read, even
    // From what a head asks for to what the next one does, and the head that begins at the second
    // of the two rows: where heads are adjacent, all heads ask for the one row and then the other.
    std::int64_t ahead_bytes = 0;
    std::int64_t second_row = 0;
    std::int64_t second_offset = 0;
  };

  static Stream stream_of(const ConstTensorView& view) {
    const std::int64_t heads = view.shape[2];
    Stream stream;
    stream.columns = view.shape[3];
    stream.head_bytes = view.strides[2] * RowsPairs::kBytes;
    const bool adjacent = view.strides[2] == view.shape[3];
    const std::int64_t pairs = kAheadBytes / (2 * RowsPairs::kBytes * stream.columns * heads);
    stream.ahead = 2 * std::clamp<std::int64_t>(pairs, 1, kTile / 2);
    stream.ahead_bytes = (adjacent ? 2 : 1) * stream.head_bytes;
    stream.second_row = adjacent ? (heads + 1) / 2 : heads;
    stream.second_offset = heads % 2 * stream.head_bytes;
    return stream;
  }

  // Two rows of a tile's tokens as heads go by, and what is to be asked for meanwhile.
  class Cursor {
   public:
    HWY_INLINE Cursor(const Stream& stream, const TokenRows& tile, const TokenRows& next,
                      std::int64_t token)
        : rows_{tile[static_cast<std::size_t>(token)], tile[static_cast<std::size_t>(token + 1)]},
          head_bytes_(stream.head_bytes),
          ahead_bytes_(stream.ahead_bytes) {
      token += stream.ahead;
      const TokenRows& rows = token < kTile ? tile : next;
      token &= kTile - 1;
      ahead_ = rows[static_cast<std::size_t>(token)];
      second_ = rows[static_cast<std::size_t>(token + 1)] + stream.second_offset;
    }

    HWY_INLINE const RowPair& rows() const { return rows_; }
    HWY_INLINE const char* ahead() const { return ahead_; }

    HWY_INLINE void next(bool second_row) {
      rows_.even += head_bytes_;
      rows_.odd += head_bytes_;
      ahead_ = second_row ? second_ : ahead_ + ahead_bytes_;
    }

   private:
    RowPair rows_;
    const char* ahead_;
    const char* second_;
    std::int64_t head_bytes_;
    std::int64_t ahead_bytes_;
  };

  // The keys of a tile and the values of another, which every row sees, all heads of two tokens
  // before the next two.
  HWY_NOINLINE void pass_whole(const Tiles& tiles) {
    const std::int64_t heads = problem_.kv_heads();
    const std::int64_t quads = quads_of_head_;
    const std::int64_t k_second = k_.second_row;
    const std::int64_t v_second = v_.second_row;
    for (std::int64_t token = 0; token < kTile; token += 2) {
      Cursor k(k_, tiles.keys.k, tiles.next.k, token);
      Cursor v(v_, tiles.values.v, tiles.keys.v, token);
      Quad* quad = quads_.data();
      for (std::int64_t head = 0; head < heads;) {
        for (std::int64_t i = 0; i < quads; ++i, ++quad) {
          if (token == 0) weigh_in_place(*quad, tiles.values, true);
          float* s = quad->s + token / 2 * kLanes;
          add_pair<kColumns>(v.rows(), v_.columns, s, v.ahead(), quad->o);
          multiply_keys(k, quad->q, s);
        }
        ++head;
        k.next(head == k_second);
        v.next(head == v_second);
      }
    }
  }

  // The same where some row does not see some value, or there is no whole tile of keys.
  HWY_NOINLINE void pass_some(const Tiles& tiles) {
    const Tile& values = tiles.values;
    const bool whole = values.count == kTile && sees_all(values);
    for (std::int64_t token = 0; token < kTile; token += 2) {
      Cursor k(k_, tiles.keys.k, tiles.next.k, token);
      Cursor v(v_, values.v, tiles.keys.v, token);
      for (std::size_t i = 0; i < quads_.size(); ++i) {
        Quad& quad = quads_[i];
        if (token == 0 && values.count > 0) weigh_in_place(quad, values, whole);
        float* s = quad.s + token / 2 * kLanes;
        if (whole) {
          add_pair<kColumns>(v.rows(), v_.columns, s, v.ahead(), quad.o);
        } else if (token < values.count) {
          add_kept<RowsByParity>(v.rows().even, v_.columns, s, quad.o);
          add_kept<RowsByParity>(v.rows().odd, v_.columns, s + kQuad, quad.o);
        }
        if (token < tiles.keys.count) {
          multiply_keys(k, quad.q, s);
        }
        const std::int64_t next = head_of(i + 1);
        if (next == head_of(i)) continue;
        k.next(next == k_.second_row);
        v.next(next == v_.second_row);
      }
    }
  }

  HWY_INLINE void multiply_keys(const Cursor& k, const float* q, float* s) const {
    const char* ahead = opaque(k.ahead());
    const auto ask_beside = [=](std::int64_t column, int step) HWY_ATTR {
      const char* line = ahead + column / kLineColumns * 2 * kLineBytes;
      if (step == 0) ask<Level::l1>(line);
      if (step == 2) ask<Level::l1>(line + kLineBytes);
    };
    score_pair<RowsByParity, kColumns>(k.rows(), k_.columns, q, ask_beside, s);
  }

  // Each weight in the place of the products that it comes from.
  HWY_NOINLINE void weigh_in_place(Quad& quad, const Tile& tile, bool whole) const {
    FloatVec p[kWeightVectors];
    weigh(quad, tile, whole, p);
    store_weights(p, quad.s);
  }

  Stream k_;
  Stream v_;
};

inline void decode_pairs(const DecodeProblem& problem, const DecodeBlock& block,
                         std::span<const AttentionState> partials, Scratch& scratch) {
  const auto has = [&](std::int64_t columns) {
    return problem.head_dim() == columns && problem.value_dim() == columns;
  };
  if (has(128)) return DecodePairs<128>(problem, block, scratch).compute(partials);
  if (has(64)) return DecodePairs<64>(problem, block, scratch).compute(partials);
  DecodePairs<0>(problem, block, scratch).compute(partials);
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_PAIRS

#endif  // ANNULUS_CPU_DECODE_PAIRS_INL
