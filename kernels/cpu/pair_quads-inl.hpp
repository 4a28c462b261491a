// What decode attention with lines asked for in the order of memory is made of: products of keys by
// pairs of tokens, in bf16 through the dot product of vectors, softmax of a tile, and where the
// next lines of memory are.
#if defined(ANNULUS_CPU_PAIR_QUADS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_PAIR_QUADS_INL
#undef ANNULUS_CPU_PAIR_QUADS_INL
#else
#define ANNULUS_CPU_PAIR_QUADS_INL
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>

#include "hwy/highway.h"
#include "kernels/cpu/decode_quads-inl.hpp"
#include "kernels/cpu/pair_products-inl.hpp"

#if ANNULUS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Columns of a line of memory.
inline constexpr std::int64_t kLineColumns = 32;
inline constexpr std::int64_t kLineBytes = 64;

/// Where lines of memory are brought to.
enum class Level : std::uint8_t { l1, l2 };

/// Asks for a line of memory. The processor forgets what is asked for while all its line buffers
/// are in use: a line beside each one that is read, and never more; the compiler must not gather
/// them.
template <Level kLevel>
HWY_INLINE void ask(const char* line) {
  if constexpr (kLevel == Level::l1) {
    asm volatile("prefetcht0 %0" : : "m"(*line));
  } else {
    asm volatile("prefetcht1 %0" : : "m"(*line));
  }
}

/// An address of which the compiler knows nothing: it would keep sums with every constant
/// in vector registers, and move them back for each line.
template <class T>
HWY_INLINE T* opaque(T* address) {
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

HWY_INLINE FloatVec as_floats(__m512i pairs) { return FloatVec{_mm512_castsi512_ps(pairs)}; }

HWY_INLINE FloatVec dot(FloatVec a, FloatVec b, FloatVec sum) {
  return add_product<Elements::bf16_pairs>(a, b, sum);
}

/// Q as it is, and rows of pairs of bf16.
struct RowsPairs {
  static constexpr std::int64_t kBytes = 2;
  static constexpr std::int64_t kColumnsOfLine = kLineColumns;
  static std::int64_t query_stride(std::int64_t dim) { return round_up(dim, kLineColumns) / 2; }
  static void store_query(std::span<const float> row, float, float* to) {
    for (std::size_t d = 0; d < row.size(); ++d) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, &row[d], sizeof(bits));
      const auto half = static_cast<std::uint16_t>(bits >> 16U);
      std::memcpy(reinterpret_cast<char*>(to) + d * sizeof(half), &half, sizeof(half));
    }
  }
  static HWY_INLINE __m512i load(const char* row, std::int64_t column, std::int64_t columns) {
    return load_line(row, column, columns);
  }
  static HWY_INLINE FloatVec multiply(FloatVec a, FloatVec b, FloatVec sum) {
    return dot(a, b, sum);
  }
};

/// Products of a quad with two keys, in parts: blocks 0 and 1 of x are those of the even key,
/// [row], 2 and 3 those of the odd one. Calls ask_beside(column, step) before the lines of a column
/// and after each row, to ask for memory.
template <class Rows, int kColumns, class AskBeside>
HWY_INLINE void score_pair(const RowPair& k, std::int64_t any_columns, const float* HWY_RESTRICT q,
                           const AskBeside& ask_beside, float* HWY_RESTRICT x) {
  const Floats d;
  const std::int64_t columns = columns_of<kColumns>(any_columns);
  const std::int64_t q_stride = Rows::query_stride(columns);
  FloatVec even[kQuad];
  FloatVec odd[kQuad];
  HWY_UNROLL(4)
  for (int r = 0; r < kQuad; ++r) even[r] = odd[r] = hn::Zero(d);
  HWY_UNROLL(4)
  for (std::int64_t column = 0; column < columns; column += Rows::kColumnsOfLine) {
    ask_beside(column, 0);
    const FloatVec k_even = as_floats(Rows::load(k.even, column, columns));
    const FloatVec k_odd = as_floats(Rows::load(k.odd, column, columns));
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      const FloatVec of_q = hn::Load(d, q + r * q_stride + column * Rows::kBytes / 4);
      even[r] = Rows::multiply(k_even, of_q, even[r]);
      odd[r] = Rows::multiply(k_odd, of_q, odd[r]);
      ask_beside(column, r + 1);
    }
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

/// o += p·V for one token, without terms of weight 0: 0 times an infinite or NaN value is not 0.
template <class Rows>
HWY_NOINLINE void add_kept(const char* row, std::int64_t columns, const float* p, float* o) {
  const Floats d;
  const std::int64_t o_stride = round_up(columns, kPair);
  for (std::int64_t r = 0; r < kQuad; ++r) {
    if (p[r] == 0.0F) continue;
    const FloatVec weight = hn::Set(d, p[r]);
    for (std::int64_t column = 0; column < columns; column += Rows::kColumnsOfLine) {
      FloatVec value[2];
      Rows::widen(Rows::load(row, column, columns), value);
      float* at = o + r * o_stride + column;
      for (int c = 0; c < Rows::kColumnsOfLine / kLanes; ++c, at += kLanes) {
        hn::Store(hn::MulAdd(weight, value[c], hn::Load(d, at)), d, at);
      }
    }
  }
}

/// What attention of a block keeps and does, however values are added. While the keys of a tile are
/// multiplied, so are the values of the tile before it.
template <class Rows>
class PairQuads : protected DecodeQuads<Rows> {
  using Base = DecodeQuads<Rows>;

 protected:
  using Base::all_see_;
  using Base::find_run;
  using Base::o_stride_;
  using Base::problem_;
  using Base::sees_all;
  using Base::tokens_;

  using Base::Base;

  static constexpr int kWeightVectors = kTile * kQuad / kLanes;
  // Scores exceed the maximum that their weights refer to by so much at most before it is raised,
  // and all sums with it.
  static constexpr float kMostAbove = 4.0F;

  using TokenRows = std::array<const char*, kTile + kQuadKeys>;

  struct Tiles {
    const Tile& values;
    const Tile& keys;
    const Tile& next;
  };

  // Calls pass(tiles) while there are values or keys, and writes what the rows sum up to after the
  // last values of a part. The sums of so many tiles are kept apart.
  template <class Pass>
  void each_tile(std::span<const AttentionState> partials, std::int64_t settled_tiles,
                 const Pass& pass) {
    find(tokens_.end, tiles_[0]);
    find(tokens_.begin, tiles_[1]);
    std::int64_t unsettled = 0;
    for (std::size_t i = 0;; i = (i + 1) % 3) {
      const Tile& values = tiles_[i];
      const Tile& keys = tiles_[(i + 1) % 3];
      Tile& next = tiles_[(i + 2) % 3];
      if (values.count == 0 && keys.count == 0) break;
      find(keys.first + keys.count, next);
      pass(Tiles{values, keys, next});
      if (values.count == 0) continue;
      if (this->ends_part(values)) {
        this->write_part(values, partials);
        unsettled = 0;
      } else if (++unsettled == settled_tiles) {
        this->settle();
        unsettled = 0;
      }
    }
  }

  // p ← the weights of a tile, [4 tokens, row] a vector, of the products of pairs of keys in s.
  HWY_INLINE void weigh(Quad& quad, const TokenRange& tile, bool whole, FloatVec* p) const {
    const Floats d;
    const FloatVec scale = hn::Set(d, problem_.scale);
    HWY_UNROLL(4)
    for (int i = 0; i < kWeightVectors; ++i) {
      const float* x = quad.s + 2 * i * kLanes;
      p[i] = hn::Mul(scores_of(hn::Load(d, x), hn::Load(d, x + kLanes)), scale);
    }
    if (!whole || problem_.soft_cap > 0.0F) change(quad, tile, p);
    FloatVec max = hn::Load(d, quad.max);
    FloatVec largest = p[0];
    HWY_UNROLL(4)
    for (int i = 1; i < kWeightVectors; ++i) largest = hn::Max(largest, p[i]);
    const FloatVec most = hn::Add(max, hn::Set(d, kMostAbove));
    // Raised by a NaN too: a row of nothing else would look like one without keys.
    if (!hn::AllTrue(d, hn::Le(largest, most))) max = raise_max(quad, largest);
    const FloatVec log2e = hn::Set(d, kLog2E);
    const FloatVec base2 = base2_max(max);
    FloatVec sum = hn::Load(d, quad.sum);
    HWY_UNROLL(4)
    for (int i = 0; i < kWeightVectors; ++i) {
      p[i] = exp2(d, hn::MulSub(p[i], log2e, base2));
      sum = hn::Add(sum, p[i]);
    }
    hn::Store(sum, d, quad.sum);
  }

  // Weights in the places of the products that they come from, [2 tokens, row].
  static HWY_INLINE void store_weights(const FloatVec* p, float* s) {
    const hn::Half<Floats> half;
    HWY_UNROLL(4)
    for (int i = 0; i < kWeightVectors; ++i, s += 2 * kLanes) {
      hn::Store(hn::LowerHalf(p[i]), half, s);
      hn::Store(hn::UpperHalf(half, p[i]), half, s + kLanes);
    }
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
  HWY_NOINLINE void change(Quad& quad, const TokenRange& tile, FloatVec* s) const {
    const Floats d;
    for (std::int64_t i = 0; i < kScores; i += kLanes) hn::Store(s[i / kLanes], d, quad.s + i);
    if (problem_.soft_cap > 0.0F) this->cap(quad);
    std::fill(quad.s + tile.count * kQuad, quad.s + kScores, kMinusInfinity);
    if (!sees_all(tile)) this->mask(tile, quad);
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

 private:
  // Where every row sees as many tiles as there are to be streams, each is made of a share of them
  // all: a token of each, then the next one of each. Behind the block's tokens a tile has none, but
  // addresses of the tokens that likely come next, to be asked for.
  void find(std::int64_t first, Tile& tile) const {
    if constexpr (Rows::kStreams > 1) {
      constexpr std::int64_t kStreams = Rows::kStreams;
      constexpr std::int64_t kRun = kTile / kStreams;
      const bool behind = first >= tokens_.end;
      const std::int64_t together = kStreams * kTile;
      const std::int64_t place = behind ? 0 : (first - tokens_.begin) % together;
      const Span all{first - place, first - place + together};
      if (intersect(behind ? all_see_ : intersect(tokens_, all_see_), all) == all) {
        tile.first = first;
        tile.count = behind ? 0 : kTile;
        for (std::int64_t i = 0; i < kStreams; ++i) {
          const std::int64_t begin = all.begin + i * kTile + place / kTile * kRun;
          find_run({begin, begin + kRun}, static_cast<std::size_t>(i), kStreams, tile);
        }
        return;
      }
    }
    Base::find(first, tile);
  }

  std::array<Tile, 3> tiles_;  // of V, of K, and the next, in turn
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_PAIRS

#endif  // ANNULUS_CPU_PAIR_QUADS_INL
