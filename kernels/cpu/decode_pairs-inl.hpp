// Decode attention in bf16 through the dot product of vectors, for processors that have it at full
// rate: keys and values pass by two tokens at a time, all heads of them, as they lie in memory.
#if defined(ANNULUS_CPU_DECODE_PAIRS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DECODE_PAIRS_INL
#undef ANNULUS_CPU_DECODE_PAIRS_INL
#else
#define ANNULUS_CPU_DECODE_PAIRS_INL
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/decode_quads-inl.hpp"
#include "kernels/cpu/pair_products-inl.hpp"

#if ANNULUS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Columns of a line of memory.
inline constexpr std::int64_t kLineColumns = 32;
inline constexpr std::int64_t kLineBytes = 64;

/// Q as it is, O in the order of columns of RowsBf16.
struct RowsPairs {
  static std::int64_t query_stride(std::int64_t dim) { return round_up(dim, kLineColumns) / 2; }
  static void store_query(std::span<const float> row, float, float* to) {
    for (std::size_t d = 0; d < row.size(); ++d) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, &row[d], sizeof(bits));
      const auto half = static_cast<std::uint16_t>(bits >> 16U);
      std::memcpy(reinterpret_cast<char*>(to) + d * sizeof(half), &half, sizeof(half));
    }
  }
  static std::int64_t place(std::int64_t column) { return RowsBf16::place(column); }
  static constexpr std::int64_t kBytes = 2;
};

/// Asks for a line of memory. The processor forgets what is asked for while all its line buffers
/// are in use: a line beside each one that is read, and never more; the compiler must not gather
/// them.
HWY_INLINE void ask(const char* line) { asm volatile("prefetcht0 %0" : : "m"(*line)); }

/// The same address, of which the compiler knows nothing: it would keep sums with every constant
/// in vector registers, and move them back for each line.
HWY_INLINE const char* opaque(const char* address) {
  asm("" : "+r"(address));
  return address;
}

/// Two rows of a head.
struct RowPair {
  const char* even = nullptr;
  const char* odd = nullptr;
};

/// How many columns a row has: known when compiled, so that loops over them unroll, or 0.
template <int kColumns>
HWY_INLINE std::int64_t columns_of(std::int64_t columns) {
  return kColumns > 0 ? kColumns : columns;
}

HWY_INLINE __m512i load_line(const char* row, std::int64_t column, std::int64_t columns) {
  const char* at = row + 2 * column;
  if (columns - column >= kLineColumns) return _mm512_loadu_si512(at);
  return _mm512_maskz_loadu_epi16((1U << static_cast<unsigned>(columns - column)) - 1U, at);
}

/// The even and the odd columns of a line.
HWY_INLINE void widen(__m512i line, FloatVec* to) {
  to[0] = FloatVec{_mm512_castsi512_ps(_mm512_slli_epi32(line, 16))};
  to[1] = FloatVec{_mm512_castsi512_ps(
      _mm512_and_si512(line, _mm512_set1_epi32(static_cast<int>(0xffff0000U))))};
}

HWY_INLINE FloatVec as_floats(__m512i pairs) { return FloatVec{_mm512_castsi512_ps(pairs)}; }

HWY_INLINE FloatVec dot(FloatVec a, FloatVec b, FloatVec sum) {
  return add_product<Elements::bf16_pairs>(a, b, sum);
}

/// Products of a quad with two keys, in parts: blocks 0 and 1 of x are those of the even key,
/// [row], 2 and 3 those of the odd one. Asks for as many lines as it reads, from `ahead` on.
template <int kColumns>
HWY_INLINE void score_pair(const RowPair& k, std::int64_t any_columns, const float* HWY_RESTRICT q,
                           const char* ahead, float* HWY_RESTRICT x) {
  const Floats d;
  const std::int64_t columns = columns_of<kColumns>(any_columns);
  const std::int64_t q_stride = RowsPairs::query_stride(columns);
  ahead = opaque(ahead);
  FloatVec even[kQuad];
  FloatVec odd[kQuad];
  HWY_UNROLL(4)
  for (int r = 0; r < kQuad; ++r) even[r] = odd[r] = hn::Zero(d);
  HWY_UNROLL(4)
  for (std::int64_t column = 0; column < columns; column += kLineColumns) {
    ask(ahead);
    const FloatVec k_even = as_floats(load_line(k.even, column, columns));
    const FloatVec k_odd = as_floats(load_line(k.odd, column, columns));
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      const FloatVec of_q = hn::Load(d, q + r * q_stride + column / 2);
      even[r] = dot(k_even, of_q, even[r]);
      odd[r] = dot(k_odd, of_q, odd[r]);
      if (r == 1) ask(ahead + kLineBytes);
    }
    ahead += 2 * kLineBytes;
  }
  const FloatVec a = block_sums(even);
  const FloatVec b = block_sums(odd);
  hn::Store(hn::Add(hn::ConcatLowerLower(d, b, a), hn::ConcatUpperUpper(d, b, a)), d, x);
}

/// s[4 tokens, row] of two pairs.
HWY_INLINE FloatVec scores_of(FloatVec x, FloatVec next) {
  return FloatVec{_mm512_add_ps(_mm512_shuffle_f32x4(x.raw, next.raw, 0x88),
                                _mm512_shuffle_f32x4(x.raw, next.raw, 0xdd))};
}

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
    widen(load_line(v.even, at, columns), even + 2 * line);
    widen(load_line(v.odd, at, columns), odd + 2 * line);
  }
  HWY_UNROLL(4)
  for (int r = 0; r < kQuad; ++r) {
    if (r < 2 * kLines) ask(ahead + r * kLineBytes);
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

/// The same for one token, without terms of weight 0: 0 times an infinite or NaN value is not 0.
HWY_NOINLINE void add_kept(const char* row, std::int64_t columns, const float* p, float* o) {
  const Floats d;
  const std::int64_t o_stride = round_up(columns, kPair);
  for (std::int64_t r = 0; r < kQuad; ++r) {
    if (p[r] == 0.0F) continue;
    const FloatVec weight = hn::Set(d, p[r]);
    for (std::int64_t column = 0; column < columns; column += kLineColumns) {
      FloatVec value[2];
      widen(load_line(row, column, columns), value);
      float* at = o + r * o_stride + column;
      for (int c = 0; c < 2; ++c, at += kLanes) {
        hn::Store(hn::MulAdd(weight, value[c], hn::Load(d, at)), d, at);
      }
    }
  }
}

/// Attention of a block. While the keys of a tile are multiplied, so are the values of the tile
/// before it, head by head of two tokens: both streams of memory move on evenly, each line is asked
/// for a few kilobytes before it is read, and the sums of all heads stay in L1.
template <int kColumns>
class DecodePairs : DecodeQuads<RowsPairs> {
 public:
  DecodePairs(const DecodeProblem& problem, const DecodeBlock& block, Scratch& scratch)
      : DecodeQuads(problem, block, scratch), k_(stream_of(problem.k)), v_(stream_of(problem.v)) {}

  void compute(const AttentionState& partial) {
    find(tokens_.end, tiles_[0]);
    find(tokens_.begin, tiles_[1]);
    std::int64_t unsettled = 0;
    for (std::size_t i = 0;; i = (i + 1) % 3) {
      const Tile& values = tiles_[i];
      const Tile& keys = tiles_[(i + 1) % 3];
      Tile& next = tiles_[(i + 2) % 3];
      if (values.count == 0 && keys.count == 0) break;
      find(keys.first + keys.count, next);
      const Tiles tiles{values, keys, next};
      if (values.count == kTile && sees_all(values) && keys.count == kTile) {
        pass_whole(tiles);
      } else {
        pass_some(tiles);
      }
      if (values.count == 0 || (++unsettled < kSettledTiles && keys.count > 0)) continue;
      settle();
      unsettled = 0;
    }
    write(partial);
  }

 private:
  struct Tiles {
    const Tile& values;
    const Tile& keys;
    const Tile& next;
  };

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

  // Tokens that fill this are asked for ahead of their use, of K and of V each. What is in use and
  // what is on its way, Q and O share 48 KB of L1.
  static constexpr std::int64_t kAheadBytes = 4096;

  Stream stream_of(const ConstTensorView& view) const {
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

  using TokenRows = std::array<const char*, kTile + kQuadKeys>;

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
          if (token == 0) weigh(*quad, tiles.values, true);
          float* s = quad->s + token / 2 * kLanes;
          add_pair<kColumns>(v.rows(), v_.columns, s, v.ahead(), quad->o);
          score_pair<kColumns>(k.rows(), k_.columns, quad->q, k.ahead(), s);
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
        if (token == 0 && values.count > 0) weigh(quad, values, whole);
        float* s = quad.s + token / 2 * kLanes;
        if (whole) {
          add_pair<kColumns>(v.rows(), v_.columns, s, v.ahead(), quad.o);
        } else if (token < values.count) {
          add_kept(v.rows().even, v_.columns, s, quad.o);
          add_kept(v.rows().odd, v_.columns, s + kQuad, quad.o);
        }
        if (token < tiles.keys.count) {
          score_pair<kColumns>(k.rows(), k_.columns, quad.q, k.ahead(), s);
        }
        const std::int64_t next = head_of(i + 1);
        if (next == head_of(i)) continue;
        k.next(next == k_.second_row);
        v.next(next == v_.second_row);
      }
    }
  }

  // Weights of a tile, [2 tokens, row], each in the place of the products of a pair of keys that
  // they come from.
  HWY_NOINLINE void weigh(Quad& quad, const Tile& tile, bool whole) const {
    const Floats d;
    const hn::Half<Floats> half;
    constexpr int kVectors = kTile * kQuad / kLanes;
    const FloatVec scale = hn::Set(d, problem_.scale);
    FloatVec s[kVectors];
    HWY_UNROLL(4)
    for (int i = 0; i < kVectors; ++i) {
      const float* x = quad.s + 2 * i * kLanes;
      s[i] = hn::Mul(scores_of(hn::Load(d, x), hn::Load(d, x + kLanes)), scale);
    }
    if (!whole || problem_.soft_cap > 0.0F) change(quad, tile, s);
    FloatVec max = hn::Load(d, quad.max);
    FloatVec largest = s[0];
    HWY_UNROLL(4)
    for (int i = 1; i < kVectors; ++i) largest = hn::Max(largest, s[i]);
    if (!hn::AllFalse(d, hn::Gt(largest, max))) max = raise_max(quad, largest);
    const FloatVec log2e = hn::Set(d, kLog2E);
    const FloatVec base2 = base2_max(max);
    FloatVec sum = hn::Load(d, quad.sum);
    HWY_UNROLL(4)
    for (int i = 0; i < kVectors; ++i) {
      const FloatVec p = exp2(d, hn::MulSub(s[i], log2e, base2));
      sum = hn::Add(sum, p);
      float* to = quad.s + 2 * i * kLanes;
      hn::Store(hn::LowerHalf(p), half, to);
      hn::Store(hn::UpperHalf(half, p), half, to + kLanes);
    }
    hn::Store(sum, d, quad.sum);
  }

  // The new maximum of each row, in all of its lanes.
  HWY_NOINLINE FloatVec raise_max(Quad& quad, FloatVec largest) const {
    const Floats d;
    const FloatVec before = hn::Load(d, quad.max);
    FloatVec max = hn::Max(before, largest);
    max = hn::Max(max, hn::ConcatLowerUpper(d, max, max));
    max = hn::Max(max, hn::SwapAdjacentBlocks(max));
    raise(quad, exp2(d, hn::Sub(hn::Mul(before, hn::Set(d, kLog2E)), base2_max(max))));
    hn::Store(max, d, quad.max);
    return max;
  }

  // Soft cap and masks.
  HWY_NOINLINE void change(Quad& quad, const Tile& tile, FloatVec* s) const {
    const Floats d;
    for (std::int64_t i = 0; i < kScores; i += kLanes) hn::Store(s[i / kLanes], d, quad.s + i);
    if (problem_.soft_cap > 0.0F) cap(quad);
    std::fill(quad.s + tile.count * kQuad, quad.s + kScores, kMinusInfinity);
    if (!sees_all(tile)) mask(tile, quad);
    for (std::int64_t i = 0; i < kScores; i += kLanes) s[i / kLanes] = hn::Load(d, quad.s + i);
  }

  // All sums so far times a factor, alike in all lanes of a row.
  HWY_NOINLINE void raise(Quad& quad, FloatVec factor) const {
    const Floats d;
    for (float* sum : {quad.sum, quad.settled_sum}) {
      hn::Store(hn::Mul(hn::Load(d, sum), factor), d, sum);
    }
    store_reduced({factor}, MaxVectors(), quad.rescale);
    for (std::int64_t r = 0; r < kQuad; ++r) {
      const FloatVec of_row = hn::Set(d, quad.rescale[r]);
      float* o = quad.o + r * o_stride_;
      for (std::int64_t i = 0; i < o_stride_; i += kLanes) {
        hn::Store(hn::Mul(hn::Load(d, o + i), of_row), d, o + i);
      }
      quad.settled_rescale[r] *= quad.rescale[r];
    }
  }

  Stream k_;
  Stream v_;
  std::array<Tile, 3> tiles_;  // of V, of K, and the next, in turn
};

inline void decode_pairs(const DecodeProblem& problem, const DecodeBlock& block,
                         const AttentionState& partial, Scratch& scratch) {
  const auto has = [&](std::int64_t columns) {
    return problem.head_dim() == columns && problem.value_dim() == columns;
  };
  if (has(128)) return DecodePairs<128>(problem, block, scratch).compute(partial);
  if (has(64)) return DecodePairs<64>(problem, block, scratch).compute(partial);
  DecodePairs<0>(problem, block, scratch).compute(partial);
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_PAIRS

#endif  // ANNULUS_CPU_DECODE_PAIRS_INL
