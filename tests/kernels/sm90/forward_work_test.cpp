#include "kernels/sm90/forward_work.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <utility>
#include <vector>

// The work table of a launch is plain arithmetic: it needs no GPU.
namespace annulus::kernels::sm90 {
namespace {

ForwardSegment segment_over(const SliceList& mask, std::int64_t seq_kv) {
  static const char byte = 0;
  ForwardSegment segment;
  segment.k = {&byte, DType::bf16, Shape{1, seq_kv, 1, 64}};
  segment.v = segment.k;
  segment.mask = mask;
  return segment;
}

std::vector<Slice> documents(std::mt19937& random, std::int64_t seq) {
  std::vector<Slice> slices;
  std::int64_t begin = 0;
  while (begin < seq) {
    const std::int64_t end = std::min(seq, begin + 1 + static_cast<std::int64_t>(random() % 100));
    slices.push_back({{begin, end}, {begin, end}, {-kUnbounded, 0}});
    begin = end;
  }
  return slices;
}

TEST(ForwardWork, FewSlicesNeedNoTable) {
  const std::vector<Slice> causal{{{0, 1000}, {0, 1000}, {-kUnbounded, 0}}};
  const std::vector<ForwardSegment> segments{segment_over({causal, {}}, 1000)};
  const ForwardWork work = plan_forward(segments, 3, 1000, {128});
  EXPECT_TRUE(work.entries.empty());
  EXPECT_EQ(work.tiles, 8);
  EXPECT_TRUE(work.last_tile_first);
  EXPECT_EQ(work.slices.size(), 1U);
  // Tiles of 128 rows meet 1, 2, …, 8 blocks of 128 keys.
  EXPECT_EQ(computed_pairs(segments, 3, 1000, {128}), 36.0 * 128 * 128);
}

// The shortest tiles of all heads come last: at a causal edge a quarter of them, by a window none.
TEST(ForwardWork, CountsTheShortTiles) {
  const auto count = [](const std::vector<Slice>& slices, std::int64_t seq) {
    const std::vector<ForwardSegment> segments{segment_over({slices, {}}, seq)};
    return plan_forward(segments, 1, seq, {128}).short_entries;
  };
  EXPECT_EQ(count({{{0, 2048}, {0, 2048}, {-kUnbounded, 0}}}, 2048), 4);
  EXPECT_EQ(count({{{0, 2048}, {0, 2048}, {0, kUnbounded}}}, 2048), 4);
  EXPECT_EQ(count({{{0, 2048}, {0, 2048}, {}}}, 2048), 0);
  EXPECT_EQ(count({{{0, 2048}, {0, 2048}, {-300, 0}}}, 2048), 0);
  std::vector<Slice> documents;  // of eight tiles, the first two of which are short
  for (std::int64_t i = 0; i < 10; ++i) {
    documents.push_back(
        {{i * 1024, i * 1024 + 1024}, {i * 1024, i * 1024 + 1024}, {-kUnbounded, 0}});
  }
  EXPECT_EQ(count(documents, 10240), 20);
}

TEST(ForwardWork, CutsTheTailWhereThatPays) {
  // 16 heads of 16k tokens: 10.4 waves of tiles, 128 blocks each. 56 multiprocessors get half a
  // tile each, the 76 others three of the quarters that are left.
  const TailCut cut = cut_tail(16 * 86, 128, 132);
  EXPECT_EQ(cut.whole, 10 * 132);
  EXPECT_EQ(cut.pieces, 5);
  EXPECT_EQ(cut.longest, 61);
  // 7.8 waves: 100 multiprocessors get most of a tile each, the 32 others up to seven of the halves
  // that are left.
  const TailCut uneven = cut_tail(8 * 128, 205, 132);
  EXPECT_EQ(uneven.whole, 7 * 132);
  EXPECT_EQ(uneven.pieces, 3);
  EXPECT_EQ(uneven.longest, 166);
  EXPECT_EQ(cut_tail(10 * 132, 128, 132).whole, 10 * 132);  // no tail
  EXPECT_EQ(cut_tail(7 * 132 + 130, 128, 132).whole, 7 * 132 + 130);
  EXPECT_EQ(cut_tail(16 * 86, 4, 132).whole, 16 * 86);  // short tiles
  EXPECT_EQ(cut_tail(3, 128, 132).whole, 0);
  EXPECT_EQ(cut_tail(3, 128, 132).pieces, 8);
  EXPECT_EQ(cut_tail(16 * 86, 0, 132).whole, 16 * 86);  // tiles of unequal lengths
}

TEST(ForwardWork, KnowsWhetherTilesReadEquallyManyKeys) {
  const auto keys = [](const Slice& slice) {
    const std::vector<Slice> slices{slice};
    const std::vector<ForwardSegment> segments{segment_over({slices, {}}, 900)};
    return plan_forward(segments, 1, 1000, {192}).equal_keys;
  };
  EXPECT_EQ(keys({{0, 1000}, {0, 900}, {}}), 900);
  EXPECT_EQ(keys({{0, 1000}, {100, 800}, {}}), 700);
  EXPECT_EQ(keys({{0, 1000}, {0, 900}, {-kUnbounded, 0}}), 0);
  EXPECT_EQ(keys({{0, 1000}, {0, 900}, {-200, 0}}), 0);
}

Span rows_of(const ForwardWork& work, const TileEntry& entry, std::int64_t tile, std::int64_t seq) {
  const std::int64_t end =
      work.rows_by_slice ? work.slices[static_cast<std::size_t>(entry.slice_begin)].q_end : seq;
  return {entry.q_begin, std::min<std::int64_t>(entry.q_begin + tile, end)};
}

// Every row is in one tile; a tile's slices are those that keep a pair of its rows.
TEST(ForwardWork, TableHoldsEveryTileWithItsSlices) {
  std::mt19937 random(11);
  int cut = 0;
  for (int round = 0; round < 50; ++round) {
    const std::int64_t seq = 1 + static_cast<std::int64_t>(random() % 2000);
    const std::int32_t tile = 1 + static_cast<std::int32_t>(random() % 192);
    const std::vector<Slice> slices = documents(random, seq);
    if (slices.size() <= static_cast<std::size_t>(kInlineSlices)) continue;
    const std::vector<ForwardSegment> segments{segment_over({slices, {}}, seq)};
    const ForwardWork work = plan_forward(segments, 1, seq, {tile});
    cut += work.rows_by_slice ? 1 : 0;
    std::vector<int> seen(static_cast<std::size_t>(seq));
    for (const TileEntry& entry : work.entries) {
      const Span rows = rows_of(work, entry, tile, seq);
      for (std::int64_t row = rows.begin; row < rows.end; ++row) {
        ++seen[static_cast<std::size_t>(row)];
      }
      const auto meeting = std::count_if(slices.begin(), slices.end(), [&](const Slice& slice) {
        return slice.coverage(rows, slice.k) != Coverage::none;
      });
      EXPECT_EQ(entry.slice_end - entry.slice_begin, meeting);
    }
    EXPECT_EQ(seen, std::vector<int>(static_cast<std::size_t>(seq), 1));
  }
  EXPECT_GT(cut, 0);
  EXPECT_LT(cut, 50);
}

// A document's first tile gets what does not fill one, and no tile holds rows of two documents.
TEST(ForwardWork, TilesEndWithTheirDocuments) {
  std::vector<Slice> slices;
  for (std::int64_t begin = 0; begin < 10 * 400; begin += 400) {
    slices.push_back({{begin, begin + 400}, {begin, begin + 400}, {-kUnbounded, 0}});
  }
  const std::vector<ForwardSegment> segments{segment_over({slices, {}}, 4000)};
  const ForwardWork work = plan_forward(segments, 1, 4100, {192});  // 100 rows of no document
  ASSERT_TRUE(work.rows_by_slice);
  std::set<std::pair<std::int64_t, std::int64_t>> tiles;
  for (const TileEntry& entry : work.entries) {
    const Span rows = rows_of(work, entry, 192, 4100);
    tiles.emplace(rows.begin, rows.end);
  }
  std::set<std::pair<std::int64_t, std::int64_t>> expected{{4000, 4100}};
  for (std::int64_t begin = 0; begin < 4000; begin += 400) {
    expected.insert({{begin, begin + 16}, {begin + 16, begin + 208}, {begin + 208, begin + 400}});
  }
  EXPECT_EQ(tiles, expected);
  // Ten documents of 1, 2 and 4 blocks of 128 keys in three tiles, whose ends count as one each.
  EXPECT_EQ(computed_pairs(segments, 1, 4100, {192}), (10.0 * 10 + 1) * 128 * 192);
}

TEST(ForwardWork, ShortFirstTilesLeaveTheOthersWhole) {
  const auto missing = [](const Slice& slice, bool short_first) {
    const std::vector<Slice> slices{slice};
    const std::vector<ForwardSegment> segments{segment_over({slices, {}}, 1000)};
    return plan_forward(segments, 1, 1000, {192, 128, short_first}).missing_rows;
  };
  const Slice causal{{0, 1000}, {0, 1000}, {-kUnbounded, 0}};
  EXPECT_EQ(missing(causal, true), 6 * 192 - 1000);
  EXPECT_EQ(missing(causal, false), 0);
  EXPECT_EQ(missing({{0, 1000}, {0, 1000}, {0, kUnbounded}}, true), 0);  // least keys at the end
}

TEST(ForwardWork, TilesComeLongestFirst) {
  std::vector<Slice> slices;
  for (std::int64_t i = 0; i < 12; ++i) {
    slices.push_back({{i * 128, i * 128 + 128}, {0, 100 + (i * 37) % 50}, {}});
  }
  const std::vector<ForwardSegment> segments{segment_over({slices, {}}, 200)};
  const ForwardWork work = plan_forward(segments, 1, 12 * 128, {128});
  ASSERT_EQ(work.entries.size(), 12U);
  std::int32_t before = 1 << 30;
  for (const TileEntry& entry : work.entries) {
    const TileSlice& slice = work.slices[static_cast<std::size_t>(entry.slice_begin)];
    EXPECT_LE(slice.k_end, before);
    before = slice.k_end;
  }
}

TEST(ForwardWork, BatchRowsWithTheirOwnSlicesAreNamed) {
  const std::vector<Slice> slices{{{0, 64}, {0, 64}, {}}, {{64, 128}, {0, 128}, {}}};
  const std::vector<std::int64_t> offsets{0, 1, 2};
  const std::vector<ForwardSegment> segments{segment_over({slices, offsets}, 128)};
  const ForwardWork work = plan_forward(segments, 2, 128, {64});
  ASSERT_EQ(work.entries.size(), 4U);
  EXPECT_TRUE(work.per_batch);
  // Longest first: batch row 1's second tile; the two tiles without keys come last.
  EXPECT_EQ(work.entries[0].batch, 1);
  EXPECT_EQ(work.entries[0].q_begin, 64);
  EXPECT_EQ(work.entries[1].batch, 0);
  for (const std::size_t i : {2U, 3U}) {
    ASSERT_EQ(work.entries[i].slice_end - work.entries[i].slice_begin, 1);
    const TileSlice& slice = work.slices[static_cast<std::size_t>(work.entries[i].slice_begin)];
    EXPECT_EQ(slice.k_begin, slice.k_end);
  }
}

}  // namespace
}  // namespace annulus::kernels::sm90
