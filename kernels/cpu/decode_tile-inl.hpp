// Products of four query rows with rows of a cache, where they lie: lanes are columns, so that no
// key is copied, and a half-precision vector is widened in a register.
#if defined(ANNULUS_CPU_DECODE_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DECODE_TILE_INL
#undef ANNULUS_CPU_DECODE_TILE_INL
#else
#define ANNULUS_CPU_DECODE_TILE_INL
#endif

#include <cstdint>
#include <cstring>
#include <span>

#include "hwy/highway.h"
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/scalar.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Rows of queries that a product takes at once: four by four sums fit 32 registers.
inline constexpr std::int64_t kQuad = 4;
inline constexpr int kQuadKeys = kPanelRows == 8 ? 4 : 2;
/// Columns loaded at once: two vectors.
inline constexpr std::int64_t kPair = 2 * kLanes;

/// Where column `column` of a row of Q or O is kept.
template <class Rows>
inline std::int64_t packed_place(std::int64_t column) {
  return column / kPair * kPair + Rows::place(column % kPair);
}

/// Q in f32, scaled, in the order of columns of the vectors that it is multiplied with.
template <class Rows>
struct ScaledQueries {
  /// Floats of a row.
  static std::int64_t query_stride(std::int64_t dim) { return (dim + kPair - 1) / kPair * kPair; }
  static void store_query(std::span<const float> row, float scale, float* to) {
    for (std::size_t d = 0; d < row.size(); ++d) {
      to[packed_place<Rows>(static_cast<std::int64_t>(d))] = row[d] * scale;
    }
  }
};

/// Two vectors of a row. Q and O are kept in the same order of columns, `place` in a pair.
struct RowsF32 : ScaledQueries<RowsF32> {
  static HWY_INLINE void load(const void* row, std::int64_t at, FloatVec& a, FloatVec& b) {
    const Floats d;
    const float* from = static_cast<const float*>(row) + at;
    a = hn::LoadU(d, from);
    b = hn::LoadU(d, from + kLanes);
  }
  static std::int64_t place(std::int64_t column) { return column; }
  static constexpr std::int64_t kBytes = 4;
};

struct RowsF16 : ScaledQueries<RowsF16> {
  static HWY_INLINE void load(const void* row, std::int64_t at, FloatVec& a, FloatVec& b) {
    const Floats d;
    const hn::Rebind<hwy::float16_t, Floats> dh;
    const hwy::float16_t* from = static_cast<const hwy::float16_t*>(row) + at;
    a = hn::PromoteTo(d, hn::LoadU(dh, from));
    b = hn::PromoteTo(d, hn::LoadU(dh, from + kLanes));
  }
  static std::int64_t place(std::int64_t column) { return column; }
  static constexpr std::int64_t kBytes = 2;
};

/// A bf16 is the upper half of a float: even and odd columns come apart by a shift and a mask,
/// which costs less than widening in order.
struct RowsBf16 : ScaledQueries<RowsBf16> {
  static HWY_INLINE void load(const void* row, std::int64_t at, FloatVec& a, FloatVec& b) {
    const Floats d;
    const hn::RebindToUnsigned<Floats> du;
    const auto* from =
        reinterpret_cast<const std::uint32_t*>(static_cast<const char*>(row) + 2 * at);
    const auto pairs = hn::LoadU(du, from);
    a = hn::BitCast(d, hn::ShiftLeft<16>(pairs));
    b = hn::BitCast(d, hn::And(pairs, hn::Set(du, 0xffff0000U)));
  }
  static std::int64_t place(std::int64_t column) { return column % 2 * kLanes + column / 2; }
  static constexpr std::int64_t kBytes = 2;
};

/// The last columns of a row, where they do not fill a pair of vectors.
template <class Rows>
class RowTail {
 public:
  RowTail(const void* row, std::int64_t at, std::int64_t columns) {
    std::memset(data_, 0, sizeof(data_));
    std::memcpy(data_, static_cast<const char*>(row) + at * Rows::kBytes,
                static_cast<std::size_t>(columns * Rows::kBytes));
  }
  HWY_INLINE void load(FloatVec& a, FloatVec& b) const { Rows::load(data_, 0, a, b); }

 private:
  alignas(64) char data_[static_cast<std::size_t>(kPair) * 4];
};

struct AddVectors {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Add(a, b);
  }
};

struct MaxVectors {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Max(a, b);
  }
};

/// Vectors that hold the four rows of a quad, over and over: one, or four of a single lane.
inline constexpr int kGroup = kLanes >= kQuad ? 1 : 4;
inline constexpr std::int64_t kGroupLanes = kGroup * kLanes;
using RowGroup = FloatVec[kGroup];

#if HWY_TARGET == HWY_SCALAR
template <class Reduce>
HWY_INLINE void store_reduced(const RowGroup& group, Reduce, float* to) {
  for (int r = 0; r < kGroup; ++r) to[r] = hn::GetLane(group[r]);
}

HWY_INLINE void store_key_sums(const FloatVec (&sum)[kQuadKeys][kQuad], float* HWY_RESTRICT s) {
  for (int key = 0; key < kQuadKeys; ++key) {
    store_reduced(sum[key], AddVectors(), s + key * kQuad);
  }
}

HWY_INLINE void load_rows(const float* rows, RowGroup& group) {
  for (int r = 0; r < kGroup; ++r) group[r] = hn::Set(Floats(), rows[r]);
}
#else
template <std::int64_t kN, class Reduce>
HWY_INLINE void store_blocks(hn::Vec<hn::FixedTag<float, kN> > v, Reduce reduce, float* to) {
  if constexpr (kN > kQuad) {
    const hn::FixedTag<float, kN / 2> half;
    store_blocks<kN / 2>(reduce(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), reduce, to);
  } else {
    hn::StoreU(v, hn::FixedTag<float, kQuad>(), to);
  }
}

/// Reduces all that belongs to a row, to four floats.
template <class Reduce>
HWY_INLINE void store_reduced(const RowGroup& group, Reduce reduce, float* to) {
  store_blocks<kLanes>(group[0], reduce, to);
}

/// The sums of the lanes of four vectors, in every block of four lanes a part of them.
HWY_INLINE FloatVec block_sums(const FloatVec (&sum)[kQuad]) {
  const Floats d;
  const hn::Repartition<std::uint64_t, Floats> dw;
  const FloatVec first = hn::Add(hn::InterleaveLower(d, sum[0], sum[1]),
                                 hn::InterleaveUpper(d, sum[0], sum[1]));  // 0 1 0 1 a block
  const FloatVec second = hn::Add(hn::InterleaveLower(d, sum[2], sum[3]),
                                  hn::InterleaveUpper(d, sum[2], sum[3]));  // 2 3 2 3
  const auto low = hn::BitCast(dw, first);
  const auto high = hn::BitCast(dw, second);
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(dw, low, high)),
                 hn::BitCast(d, hn::InterleaveUpper(dw, low, high)));
}

/// The sums of all keys, s[key, row].
HWY_INLINE void store_key_sums(const FloatVec (&sum)[kQuadKeys][kQuad], float* HWY_RESTRICT s) {
  const Floats d;
  if constexpr (kLanes == 16 && kQuadKeys == 4) {
    const FloatVec k0 = block_sums(sum[0]);
    const FloatVec k1 = block_sums(sum[1]);
    const FloatVec k2 = block_sums(sum[2]);
    const FloatVec k3 = block_sums(sum[3]);
    FloatVec even = hn::Add(hn::ConcatLowerLower(d, k2, k0), hn::ConcatUpperUpper(d, k2, k0));
    FloatVec odd = hn::Add(hn::ConcatLowerLower(d, k3, k1), hn::ConcatUpperUpper(d, k3, k1));
    even = hn::Add(even, hn::SwapAdjacentBlocks(even));  // 0 0 2 2
    odd = hn::Add(odd, hn::SwapAdjacentBlocks(odd));     // 1 1 3 3
    hn::Store(hn::OddEvenBlocks(odd, even), d, s);
  } else {
    HWY_UNROLL(4)
    for (int key = 0; key < kQuadKeys; ++key) {
      store_blocks<kLanes>(block_sums(sum[key]), AddVectors(), s + key * kQuad);
    }
  }
}

/// Four floats, over and over.
HWY_INLINE void load_rows(const float* rows, RowGroup& group) {
  group[0] = hn::LoadDup128(Floats(), rows);
}
#endif

/// What a product reads: rows of keys or values of one head, by address.
struct CacheRows {
  const char* const* rows = nullptr;  // of head 0
  std::int64_t head_bytes = 0;        // from there to this head

  const char* operator[](std::int64_t token) const { return rows[token] + head_bytes; }
};

/// Asks for what a pair of vectors will read from a row in the next tile, one line at a time: a
/// core has 16 line buffers, which rows asked for in one go would hold for all others.
template <class Rows>
HWY_INLINE void prefetch_pair(const char* row, std::int64_t column) {
  const char* at = row + column * Rows::kBytes;
  __builtin_prefetch(at, 0, 2);
  if constexpr (kPair * Rows::kBytes > 64) __builtin_prefetch(at + 64, 0, 2);
}

/// Products of a quad with kQuadKeys keys: s[key, row]. `ahead` are those of the next tile.
template <class Rows>
HWY_INLINE void score_keys(const CacheRows& k, const CacheRows& ahead, std::int64_t token,
                           std::int64_t columns, const float* HWY_RESTRICT q, std::int64_t q_stride,
                           float* HWY_RESTRICT s) {
  const Floats d;
  const char* row[kQuadKeys];
  const char* later[kQuadKeys];
  FloatVec sum[kQuadKeys][kQuad];
  HWY_UNROLL(4)
  for (int key = 0; key < kQuadKeys; ++key) {
    row[key] = k[token + key];
    later[key] = ahead[token + key];
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) sum[key][r] = hn::Zero(d);
  }
  const auto add = [&](const FloatVec(&a)[kQuadKeys], const FloatVec(&b)[kQuadKeys],
                       std::int64_t at) HWY_ATTR {
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      const FloatVec qa = hn::Load(d, q + r * q_stride + at);
      const FloatVec qb = hn::Load(d, q + r * q_stride + at + kLanes);
      HWY_UNROLL(4)
      for (int key = 0; key < kQuadKeys; ++key) {
        sum[key][r] = hn::MulAdd(a[key], qa, sum[key][r]);
        sum[key][r] = hn::MulAdd(b[key], qb, sum[key][r]);
      }
    }
  };
  FloatVec a[kQuadKeys];
  FloatVec b[kQuadKeys];
  std::int64_t column = 0;
  for (; column + kPair <= columns; column += kPair) {
    HWY_UNROLL(4)
    for (int key = 0; key < kQuadKeys; ++key) {
      Rows::load(row[key], column, a[key], b[key]);
      prefetch_pair<Rows>(later[key], column);
    }
    add(a, b, column);
  }
  if (column < columns) {
    for (int key = 0; key < kQuadKeys; ++key) {
      RowTail<Rows>(row[key], column, columns - column).load(a[key], b[key]);
    }
    add(a, b, column);
  }
  store_key_sums(sum, s);
}

/// Whether terms of weight 0 are left out: 0 times an infinite or NaN value is not 0.
enum class Weights : std::uint8_t { all, kept };

/// o ← o·rescale + p·V for kPairs pairs of vectors of columns, p[token, row].
template <class Rows, int kPairs, Weights kWeights>
HWY_INLINE void add_value_columns(const CacheRows& v, const CacheRows& ahead, std::int64_t tokens,
                                  std::int64_t column, std::int64_t tail,
                                  const float* HWY_RESTRICT p, const float* HWY_RESTRICT rescale,
                                  float* HWY_RESTRICT o, std::int64_t o_stride) {
  const Floats d;
  constexpr int kVectors = 2 * kPairs;
  FloatVec sum[kQuad][kVectors];  // apart from o, beside which small terms would be rounded away
  HWY_UNROLL(4)
  for (int r = 0; r < kQuad; ++r) {
    HWY_UNROLL(4)
    for (int c = 0; c < kVectors; ++c) sum[r][c] = hn::Zero(d);
  }
  for (std::int64_t token = 0; token < tokens; ++token) {
    const char* row = v[token];
    const char* later = ahead[token];
    FloatVec value[kVectors];
    if (tail > 0) {
      RowTail<Rows>(row, column, tail).load(value[0], value[1]);
    } else {
      HWY_UNROLL(2)
      for (int c = 0; c < kPairs; ++c) {
        Rows::load(row, column + c * kPair, value[2 * c], value[2 * c + 1]);
        prefetch_pair<Rows>(later, column + c * kPair);
      }
    }
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      const float weight = p[token * kQuad + r];
      if (kWeights == Weights::kept && weight == 0.0F) continue;
      HWY_UNROLL(4)
      for (int c = 0; c < kVectors; ++c) {
        sum[r][c] = hn::MulAdd(hn::Set(d, weight), value[c], sum[r][c]);
      }
    }
  }
  HWY_UNROLL(4)
  for (int r = 0; r < kQuad; ++r) {
    HWY_UNROLL(4)
    for (int c = 0; c < kVectors; ++c) {
      float* at = o + r * o_stride + column + c * kLanes;
      hn::Store(hn::MulAdd(hn::Set(d, rescale[r]), hn::Load(d, at), sum[r][c]), d, at);
    }
  }
}

/// The same for all columns of a row.
template <class Rows, Weights kWeights>
HWY_INLINE void add_values(const CacheRows& v, const CacheRows& ahead, std::int64_t tokens,
                           std::int64_t columns, const float* p, const float* rescale, float* o,
                           std::int64_t o_stride) {
  constexpr int kPairs = kPanelRows == 8 ? 2 : 1;
  std::int64_t column = 0;
  for (; column + kPairs * kPair <= columns; column += kPairs * kPair) {
    add_value_columns<Rows, kPairs, kWeights>(v, ahead, tokens, column, 0, p, rescale, o, o_stride);
  }
  for (; column < columns; column += kPair) {
    const std::int64_t left = columns - column;
    add_value_columns<Rows, 1, kWeights>(v, ahead, tokens, column, left < kPair ? left : 0, p,
                                         rescale, o, o_stride);
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_DECODE_TILE_INL
