#include "sharding/sequence_layout.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "kernels/error.hpp"
#include "sharding/cost_model.hpp"

namespace annulus {
namespace {

// Every row lies on exactly one rank, in ascending order there, and the maps are inverses.
void expect_consistent(const SequenceLayout& layout, std::int64_t seq, int ranks) {
  ASSERT_EQ(layout.seq(), seq);
  ASSERT_EQ(layout.ranks(), ranks);
  std::vector<std::int64_t> next(static_cast<std::size_t>(ranks), 0);
  for (std::int64_t row = 0; row < seq; ++row) {
    const int rank = layout.rank_of(row);
    ASSERT_EQ(layout.local_row(row), next[static_cast<std::size_t>(rank)]++);
    ASSERT_EQ(layout.global_row(rank, layout.local_row(row)), row);
  }
  std::int64_t covered = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    ASSERT_EQ(layout.rows(rank), next[static_cast<std::size_t>(rank)]);
    std::int64_t begin = 0;
    std::int64_t last = -1;
    for (const RowRun& run : layout.runs(rank)) {
      ASSERT_EQ(run.begin, begin);
      ASSERT_GT(run.global.begin, last);
      ASSERT_GT(run.global.size(), 0);
      begin += run.global.size();
      last = run.global.end;  // runs that touch are one
    }
    covered += begin;
  }
  ASSERT_EQ(covered, seq);
}

MaskSlices causal(std::int64_t seq) {
  AttentionMask mask;
  mask.causal = true;
  return make_slices(mask, 1, seq, seq);
}

MaskSlices documents(std::int64_t seq, std::int64_t mean, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::int64_t> offsets{0};
  while (offsets.back() < seq) {
    const std::int64_t length = 1 + static_cast<std::int64_t>(random()) % mean + mean / 2;
    offsets.push_back(std::min(seq, offsets.back() + std::max<std::int64_t>(length, 1)));
  }
  AttentionMask mask;
  mask.causal = true;
  mask.q_segments = {segments_of_offsets(offsets, seq)};
  return make_slices(mask, 1, seq, seq);
}

TEST(SequenceLayout, MapsAreInverseForEveryKindLengthAndNumberOfRanks) {
  for (const std::int64_t seq : {0, 1, 2, 5, 17, 64, 101}) {
    const MaskSlices mask = causal(seq);
    for (const int ranks : {1, 2, 3, 4, 5, 8, 13}) {
      expect_consistent(SequenceLayout::contiguous(seq, ranks), seq, ranks);
      expect_consistent(SequenceLayout::zigzag(seq, ranks), seq, ranks);
      expect_consistent(SequenceLayout::balanced(mask, 1, seq, ranks), seq, ranks);
      for (const std::int64_t chunk : {1, 3, 7}) {
        expect_consistent(SequenceLayout::balanced(mask, 1, seq, ranks, chunk), seq, ranks);
      }
    }
  }
}

TEST(SequenceLayout, ContiguousGivesTheFirstRanksOneRowMore) {
  const SequenceLayout layout = SequenceLayout::contiguous(10, 4);
  EXPECT_EQ(layout.rows(0), 3);
  EXPECT_EQ(layout.rows(1), 3);
  EXPECT_EQ(layout.rows(2), 2);
  EXPECT_EQ(layout.rows(3), 2);
}

TEST(SequenceLayout, ContiguousTakesAnyLengths) {
  const std::vector<std::int64_t> rows{4, 0, 3};
  const SequenceLayout layout = SequenceLayout::contiguous(rows);
  expect_consistent(layout, 7, 3);
  EXPECT_EQ(layout.rows(1), 0);
  EXPECT_EQ(layout.rank_of(4), 2);
}

TEST(SequenceLayout, GroupedNodesHoldTheirRanksRowsInGlobalOrder) {
  const SequenceLayout nodes = SequenceLayout::zigzag(96, 4).grouped(2);
  expect_consistent(nodes, 96, 2);
  for (std::int64_t row = 0; row < 96; ++row) {
    EXPECT_EQ(nodes.rank_of(row), SequenceLayout::zigzag(96, 4).rank_of(row) / 2);
  }
  EXPECT_THROW(SequenceLayout::zigzag(96, 4).grouped(3), Error);
}

TEST(SequenceLayout, ChunkAreasSumToTheMask) {
  const MaskSlices mask = documents(5000, 300, 7);
  const std::vector<std::int64_t> area =
      areas(SequenceLayout::balanced(mask, 1, 5000, 6, 50), mask, 1);
  std::int64_t sum = 0;
  for (const std::int64_t part : area) sum += part;
  EXPECT_EQ(sum, mask.area(0));
}

struct Balance {
  double contiguous, zigzag, balanced;
};

Balance balance_of(const MaskSlices& mask, std::int64_t seq, int ranks) {
  const auto of = [&](const SequenceLayout& layout) { return imbalance(areas(layout, mask, 1)); };
  const Balance found{of(SequenceLayout::contiguous(seq, ranks)),
                      of(SequenceLayout::zigzag(seq, ranks)),
                      of(SequenceLayout::balanced(mask, 1, seq, ranks))};
  return found;
}

TEST(SequenceLayout, CausalIsBalanced) {
  const Balance small = balance_of(causal(65536), 65536, 8);
  EXPECT_LE(small.balanced, 1.02);
  EXPECT_LE(small.zigzag, 1.02);
  EXPECT_GT(small.contiguous, 1.8);
  const Balance large = balance_of(causal(1 << 20), 1 << 20, 512);
  EXPECT_LE(large.balanced, 1.05);
}

// Kept pairs, and what the tiles of a rank's rows cost in such.
double imbalance_of_work(const SequenceLayout& layout, const MaskSlices& mask) {
  std::vector<std::int64_t> work = areas(layout, mask, 1);
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    work[static_cast<std::size_t>(rank)] += 192 * layout.rows(rank);
  }
  return imbalance(work);
}

TEST(SequenceLayout, RandomDocumentsAreBalanced) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  for (const std::int64_t mean : {512, 4096, 20000}) {
    const MaskSlices few = documents(65536, mean, seed), many = documents(1 << 20, mean, seed);
    EXPECT_LE(imbalance_of_work(SequenceLayout::balanced(few, 1, 65536, 8), few), 1.02);
    EXPECT_LE(imbalance_of_work(SequenceLayout::balanced(many, 1, 1 << 20, 512), many), 1.05);
  }
}

// Rows that ranks need from others, in all.
std::int64_t rows_moved(const SequenceLayout& layout, const MaskSlices& mask) {
  const GroupShares shares = group_shares(layout, layout, mask, 1);
  return std::accumulate(shares.rows_received.begin(), shares.rows_received.end(), std::int64_t{0});
}

TEST(SequenceLayout, DocumentsStayWholeWhereBalanceAllows) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  const std::int64_t seq = 65536;
  const int ranks = 8;
  for (const std::int64_t mean : {64, 512, 2048}) {
    const MaskSlices mask = documents(seq, mean, seed);
    const SequenceLayout layout = SequenceLayout::balanced(mask, 1, seq, ranks);
    expect_consistent(layout, seq, ranks);
    EXPECT_LE(imbalance_of_work(layout, mask), 1.02);
    std::vector<std::int64_t> rows;
    for (int rank = 0; rank < ranks; ++rank) rows.push_back(layout.rows(rank));
    EXPECT_LE(imbalance(rows), 1.2);
    // Equal chunks without regard to documents.
    const std::int64_t blind =
        rows_moved(SequenceLayout::balanced(mask, 1, seq, ranks, seq / (ranks * 16)), mask);
    EXPECT_LE(rows_moved(layout, mask), blind / 2) << mean;
  }
}

TEST(SequenceLayout, DocumentsOfOneRankSendNothing) {
  // As many equal documents as ranks.
  std::vector<std::int64_t> offsets;
  for (int i = 0; i <= 8; ++i) offsets.push_back(i * 100);
  AttentionMask mask;
  mask.causal = true;
  mask.q_segments = {segments_of_offsets(offsets, 800)};
  const MaskSlices slices = make_slices(mask, 1, 800, 800);
  const SequenceLayout layout = SequenceLayout::balanced(slices, 1, 800, 8);
  EXPECT_EQ(layout, SequenceLayout::contiguous(800, 8));
  EXPECT_EQ(rows_moved(layout, slices), 0);
}

TEST(SequenceLayout, WindowsAreCutIntoOneRunForEachRank) {
  AttentionMask window;
  window.causal = true;
  window.window_left = 4096;
  for (const int ranks : {2, 5, 8}) {
    const std::int64_t seq = std::int64_t{8192} * ranks;
    const MaskSlices mask = make_slices(window, 1, seq, seq);
    const SequenceLayout layout = SequenceLayout::balanced(mask, 1, seq, ranks);
    expect_consistent(layout, seq, ranks);
    EXPECT_LE(imbalance_of_work(layout, mask), 1.02);
    for (int rank = 0; rank < ranks; ++rank) {
      ASSERT_EQ(layout.runs(rank).size(), 1U);
      EXPECT_EQ(layout.runs(rank).front().global.begin % 128, 0);
      EXPECT_LE(layout.rows(rank), 8192 * 125 / 100);
    }
  }
}

TEST(SequenceLayout, AlignedKeepsBlocksWhole) {
  for (const std::int64_t block : {1, 7, 16, 300}) {
    for (const SequenceLayout& layout :
         {SequenceLayout::contiguous(203, 5), SequenceLayout::zigzag(203, 4)}) {
      const SequenceLayout aligned = layout.aligned(block);
      expect_consistent(aligned, 203, layout.ranks());
      for (std::int64_t row = 0; row < 203; ++row) {
        EXPECT_EQ(aligned.rank_of(row), layout.rank_of(row / block * block));
      }
    }
  }
  EXPECT_THROW(SequenceLayout::contiguous(9, 2).aligned(0), Error);
}

}  // namespace
}  // namespace annulus
