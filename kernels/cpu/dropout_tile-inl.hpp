// Dropout factors of a tile: Philox on global (batch, head, query, key), a vector of queries at
// once, four keys to a draw. The scalar form is dropout_keeps in kernels/philox.hpp.
#if defined(ANNULUS_CPU_DROPOUT_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DROPOUT_TILE_INL
#undef ANNULUS_CPU_DROPOUT_TILE_INL
#else
#define ANNULUS_CPU_DROPOUT_TILE_INL
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/cpu/positions.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/philox.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Words = hn::ScalableTag<std::uint32_t>;
using WordVec = hn::Vec<Words>;

struct WideProduct {
  WordVec high;
  WordVec low;
};

HWY_INLINE WideProduct multiply_wide(WordVec a, std::uint32_t factor) {
  const Words d;
#if HWY_TARGET == HWY_SCALAR
  const std::uint64_t product = std::uint64_t{factor} * hn::GetLane(a);
  return {hn::Set(d, static_cast<std::uint32_t>(product >> 32)),
          hn::Set(d, static_cast<std::uint32_t>(product))};
#else
  const hn::Repartition<std::uint64_t, Words> dw;
  const WordVec b = hn::Set(d, factor);
  const auto even = hn::MulEven(a, b);
  const auto odd = hn::MulEven(hn::BitCast(d, hn::ShiftRight<32>(hn::BitCast(dw, a))), b);
  const auto low_half = hn::Set(dw, 0xffffffffULL);
  return {hn::BitCast(d, hn::Or(hn::ShiftRight<32>(even), hn::AndNot(low_half, odd))),
          hn::BitCast(d, hn::Or(hn::And(even, low_half), hn::ShiftLeft<32>(odd)))};
#endif
}

struct PhiloxWords {
  WordVec word[4];
};

HWY_INLINE PhiloxWords philox_words(PhiloxWords counter, std::uint64_t seed) {
  const Words d;
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const WideProduct a = multiply_wide(counter.word[0], 0xD2511F53U);
    const WideProduct b = multiply_wide(counter.word[2], 0xCD9E8D57U);
    counter = {hn::Xor(hn::Xor(b.high, counter.word[1]), hn::Set(d, key0)), b.low,
               hn::Xor(hn::Xor(a.high, counter.word[3]), hn::Set(d, key1)), a.low};
    key0 += 0x9E3779B9U;
    key1 += 0xBB67AE85U;
  }
  return counter;
}

/// tile[key, lane] ← 1 / (1 − p) where dropout keeps the element, else 0.
inline void load_dropout_tile(const Dropout& dropout, std::int64_t batch, const TileRows& rows,
                              std::int64_t vectors, Span keys, float* HWY_RESTRICT tile) {
  const Floats df;
  const Words d;
  HWY_ALIGN std::uint32_t query[kTileLanes];
  HWY_ALIGN std::uint32_t head[kTileLanes];
  for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
    const auto i = static_cast<std::size_t>(lane);
    query[lane] = static_cast<std::uint32_t>(global_position(dropout.q_positions, rows.query[i]));
    head[lane] = static_cast<std::uint32_t>(rows.head[i] + dropout.q_head_begin);
  }
  const WordVec threshold = hn::Set(d, dropout_threshold(dropout.probability));
  const FloatVec factor = hn::Set(df, 1.0F / (1.0F - dropout.probability));
  const WordVec batch_word = hn::Set(d, static_cast<std::uint32_t>(batch + dropout.batch_begin));
  for (std::int64_t v = 0; v < vectors; ++v) {
    std::int64_t drawn = -1;
    PhiloxWords words{};
    for (std::int64_t key = keys.begin; key < keys.end; ++key) {
      const std::int64_t global_key = global_position(dropout.k_positions, key);
      if (global_key >> 2 != drawn) {
        drawn = global_key >> 2;
        words = philox_words(
            {{hn::Set(d, static_cast<std::uint32_t>(drawn)), hn::Load(d, query + v * kLanes),
              hn::Load(d, head + v * kLanes), batch_word}},
            dropout.seed);
      }
      const auto dropped = hn::Lt(words.word[global_key & 3], threshold);
      hn::Store(hn::IfThenZeroElse(hn::RebindMask(df, dropped), factor), df,
                tile + (key - keys.begin) * kTileLanes + v * kLanes);
    }
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_DROPOUT_TILE_INL
