#include "kernels/mask.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>

#include "kernels/error.hpp"

namespace annulus {
namespace {

std::int64_t draw(std::mt19937& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

Slice random_slice(std::mt19937& random) {
  Slice slice;
  slice.q.begin = draw(random, 0, 12);
  slice.q.end = slice.q.begin + draw(random, 0, 12);
  slice.k.begin = draw(random, 0, 12);
  slice.k.end = slice.k.begin + draw(random, 0, 12);
  if (draw(random, 0, 3) != 0) slice.band.lo = draw(random, -20, 20);
  if (draw(random, 0, 3) != 0) slice.band.hi = draw(random, -20, 20);
  return slice;
}

Span random_span(std::mt19937& random) {
  const std::int64_t begin = draw(random, 0, 20);
  return {begin, begin + draw(random, 1, 8)};
}

TEST(Slice, AreaClipAndCoverageMatchBruteForce) {
  std::mt19937 random(20);
  for (int trial = 0; trial < 5000; ++trial) {
    const Slice slice = random_slice(random);
    const Span rows = random_span(random);
    const Span columns = random_span(random);
    const Slice part = clip(slice, rows, columns);
    std::int64_t area = 0;
    std::int64_t inside = 0;
    for (std::int64_t q = 0; q < 32; ++q) {
      for (std::int64_t k = 0; k < 32; ++k) {
        const bool here = rows.contains(q) && columns.contains(k);
        area += slice.keeps(q, k) ? 1 : 0;
        inside += here && slice.keeps(q, k) ? 1 : 0;
        EXPECT_EQ(part.keeps(q, k), here && slice.keeps(q, k));
      }
    }
    EXPECT_EQ(slice.area(), area);
    EXPECT_EQ(part.area(), inside);
    const Coverage expected = inside == 0                              ? Coverage::none
                              : inside == rows.size() * columns.size() ? Coverage::full
                                                                       : Coverage::partial;
    EXPECT_EQ(slice.coverage(rows, columns), expected);
  }
}

TEST(Slices, WindowsOfAnyWidthKeepWhatTheyCover) {
  constexpr std::int64_t kWidest = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t side : {std::int64_t{9}, kUnbounded - 1, kUnbounded, kWidest}) {
    AttentionMask mask;
    mask.window_left = side;
    mask.window_right = 0;
    EXPECT_EQ(make_slices(mask, 1, 10, 10).area(0), 55) << side;
    EXPECT_EQ(make_slices(mask, 1, 4, 10).area(0), 34) << side;
    mask.window_right = side;
    EXPECT_EQ(make_slices(mask, 1, 10, 10).area(0), 100) << side;
    EXPECT_EQ(make_slices(mask, 1, 10, 4).area(0), 40) << side;
  }
}

TEST(Slices, NegativeSidesAndPrefixesAreRefused) {
  AttentionMask mask;
  mask.window_left = -2;
  EXPECT_THROW(make_slices(mask, 1, 4, 4), Error);
  mask.window_left = -1;
  mask.prefix_lengths = {-1};
  EXPECT_THROW(make_slices(mask, 1, 4, 4), Error);
}

// After clip() the first and the last row and key each hold a kept pair.
TEST(Slice, ClipIsTight) {
  std::mt19937 random(21);
  for (int trial = 0; trial < 2000; ++trial) {
    const Slice part = clip(random_slice(random), {0, 32}, {0, 32});
    if (part.area() == 0) continue;
    for (const std::int64_t q : {part.q.begin, part.q.end - 1}) {
      EXPECT_GT((Slice{{q, q + 1}, part.k, part.band}.area()), 0);
    }
    for (const std::int64_t k : {part.k.begin, part.k.end - 1}) {
      EXPECT_GT((Slice{part.q, {k, k + 1}, part.band}.area()), 0);
    }
  }
}

TEST(Band, ShiftKeepsTheSamePairs) {
  const Band band{-3, 5};
  const Band shifted = band.shifted(10, 4);
  for (std::int64_t q = 10; q < 30; ++q) {
    for (std::int64_t k = 4; k < 30; ++k) {
      EXPECT_EQ(band.keeps(q, k), shifted.keeps(q - 10, k - 4));
    }
  }
  EXPECT_EQ(Band{}.shifted(100, 7), Band{});
}

using Keeps = std::function<bool(std::int64_t b, std::int64_t q, std::int64_t k)>;

// Every pair is kept by exactly as many slices as `keeps` says: one or none.
void expect_pairs(const AttentionMask& mask, std::int64_t batch, std::int64_t seq_q,
                  std::int64_t seq_kv, const Keeps& keeps) {
  const MaskSlices slices = make_slices(mask, batch, seq_q, seq_kv);
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t q = 0; q < seq_q; ++q) {
      for (std::int64_t k = 0; k < seq_kv; ++k) {
        int count = 0;
        for (const Slice& slice : slices.view().of_batch(b)) count += slice.keeps(q, k) ? 1 : 0;
        ASSERT_EQ(count, keeps(b, q, k) ? 1 : 0) << "b " << b << " q " << q << " k " << k;
      }
    }
  }
}

TEST(MakeSlices, CausalIsBottomRightAligned) {
  AttentionMask mask;
  mask.causal = true;
  for (const auto& [seq_q, seq_kv] : {std::pair{5, 5}, {3, 7}, {7, 3}, {1, 4}, {0, 3}, {3, 0}}) {
    expect_pairs(mask, 1, seq_q, seq_kv, [&](std::int64_t, std::int64_t q, std::int64_t k) {
      return k <= q + seq_kv - seq_q;
    });
  }
}

TEST(MakeSlices, WindowsBoundBothSides) {
  for (const bool causal : {false, true}) {
    AttentionMask mask;
    mask.causal = causal;
    mask.window_left = 3;
    mask.window_right = 2;
    expect_pairs(mask, 1, 9, 12, [&](std::int64_t, std::int64_t q, std::int64_t k) {
      const std::int64_t distance = k - (q + 3);
      return distance >= -3 && distance <= (causal ? 0 : 2);
    });
  }
}

TEST(MakeSlices, SegmentsMeetTheirOwnKindOnly) {
  const std::vector<std::vector<std::int32_t>> ids{{0, 0, 1, 1, 1, -1}, {4, 2, 2, 4, -1, 4}};
  for (const bool causal : {false, true}) {
    AttentionMask mask;
    mask.causal = causal;
    for (const auto& row : ids) mask.q_segments.push_back(segments_of(row));
    expect_pairs(mask, 2, 6, 6, [&](std::int64_t b, std::int64_t q, std::int64_t k) {
      const auto& row = ids[static_cast<std::size_t>(b)];
      const std::int32_t mine = row[static_cast<std::size_t>(q)];
      return mine >= 0 && mine == row[static_cast<std::size_t>(k)] && (!causal || k <= q);
    });
  }
}

TEST(MakeSlices, OffsetsAlignEachSegmentAtItsEnd) {
  const std::vector<std::int64_t> q_offsets{0, 2, 2, 5};
  const std::vector<std::int64_t> kv_offsets{0, 4, 5, 7};
  AttentionMask mask;
  mask.causal = true;
  mask.align_per_segment = true;
  mask.q_segments = {segments_of_offsets(q_offsets, 6)};
  mask.kv_segments = {segments_of_offsets(kv_offsets, 7)};
  expect_pairs(mask, 1, 6, 7, [&](std::int64_t, std::int64_t q, std::int64_t k) {
    for (std::size_t i = 0; i + 1 < q_offsets.size(); ++i) {
      if (q_offsets[i] <= q && q < q_offsets[i + 1] && kv_offsets[i] <= k &&
          k < kv_offsets[i + 1]) {
        return kv_offsets[i + 1] - 1 - k >= q_offsets[i + 1] - 1 - q;
      }
    }
    return false;
  });
}

TEST(MakeSlices, PrefixIsSeenInSpiteOfCausal) {
  AttentionMask mask;
  mask.causal = true;
  mask.prefix_lengths = {3, 0};
  mask.q_segments = {segments_of(std::vector<std::int32_t>{0, 0, 0, 0, 1, 1, 1, 1})};
  expect_pairs(mask, 2, 8, 8, [&](std::int64_t b, std::int64_t q, std::int64_t k) {
    return (q < 4) == (k < 4) && (k <= q || (b == 0 && k < 3));
  });
}

TEST(MakeSlices, BlocksCombineWithTheRest) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 50; ++trial) {
    AttentionMask mask;
    mask.causal = trial % 2 == 0;
    mask.block_q = draw(random, 1, 5);
    mask.block_kv = draw(random, 1, 5);
    const std::int64_t columns = (11 + mask.block_kv - 1) / mask.block_kv;
    const std::int64_t blocks = ((9 + mask.block_q - 1) / mask.block_q) * columns;
    for (std::int64_t i = 0; i < blocks; ++i) {
      mask.kept_blocks.push_back(static_cast<std::uint8_t>(draw(random, 0, 1)));
    }
    expect_pairs(mask, 1, 9, 11, [&](std::int64_t, std::int64_t q, std::int64_t k) {
      const std::int64_t block = q / mask.block_q * columns + k / mask.block_kv;
      return mask.kept_blocks[static_cast<std::size_t>(block)] != 0 && (!mask.causal || k <= q + 2);
    });
  }
}

TEST(MakeSlices, RefusesWhatDoesNotFit) {
  AttentionMask mask;
  mask.q_segments = {segments_of(std::vector<std::int32_t>{0, 0, 1})};
  EXPECT_THROW(make_slices(mask, 1, 4, 4), Error);
  EXPECT_THROW(make_slices(mask, 1, 3, 4), Error);
  mask.kv_segments = {{{{0, 2}, 0}, {{3, 4}, 0}}};
  EXPECT_THROW(make_slices(mask, 1, 3, 4), Error);
  EXPECT_THROW(segments_of_offsets(std::vector<std::int64_t>{0, 5, 3}, 8), Error);
  EXPECT_THROW(segments_of_offsets(std::vector<std::int64_t>{0, 9}, 8), Error);
  EXPECT_THROW(segments_of_offsets(std::vector<std::int64_t>{1, 5}, 8), Error);
}

TEST(MaskSlices, AreaOfCausalIsTheTriangle) {
  AttentionMask mask;
  mask.causal = true;
  const std::int64_t seq = 1'000'000;
  EXPECT_EQ(make_slices(mask, 1, seq, seq).area(0), seq * (seq + 1) / 2);
}

}  // namespace
}  // namespace annulus
