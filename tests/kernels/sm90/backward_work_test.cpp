#include "kernels/sm90/backward_work.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>

#include "kernels/sm90/backward_turns.hpp"

namespace annulus::kernels::sm90 {
namespace {

using Pair = std::pair<std::int64_t, std::int64_t>;

/// How often the blocks of a batch row compute each kept pair.
std::map<Pair, int> covered(const ForwardWork& work, std::int32_t batch, std::int64_t block) {
  std::map<Pair, int> times;
  for (const TileEntry& entry : work.entries) {
    if (entry.batch >= 0 && entry.batch != batch) continue;
    for (std::int32_t i = entry.slice_begin; i < entry.slice_end; ++i) {
      const TileSlice& s = work.slices[static_cast<std::size_t>(i)];
      const std::int64_t end = std::min<std::int64_t>(entry.q_begin + block, s.k_end);
      for (std::int64_t k = entry.q_begin; k < end; ++k) {
        for (std::int64_t q = s.q_begin; q < s.q_end; ++q) {
          if (s.lo <= k - q && k - q <= s.hi) ++times[{q, k}];
        }
      }
    }
  }
  return times;
}

void expect_covered(const SliceList& mask, std::int64_t batch, std::int32_t block,
                    BlockOrder order) {
  const ForwardWork work = plan_backward(mask, batch, block, order);
  for (std::int32_t b = 0; b < batch; ++b) {
    std::map<Pair, int> expected;
    for (const Slice& slice : mask.of_batch(b)) {
      for (std::int64_t q = slice.q.begin; q < slice.q.end; ++q) {
        for (std::int64_t k = slice.k.begin; k < slice.k.end; ++k) {
          if (slice.keeps(q, k)) expected[{q, k}] = 1;
        }
      }
    }
    EXPECT_EQ(covered(work, b, block), expected);
  }
}

TEST(BackwardWork, CoversEachPairOnce) {
  std::mt19937 random(std::random_device{}());
  for (int i = 0; i < 200; ++i) {
    const std::int64_t half = 1 + static_cast<std::int64_t>(random() % 60);
    const std::int64_t keys = 1 + static_cast<std::int64_t>(random() % 150);
    const auto some = static_cast<std::int64_t>(random() % 100) - 50;
    // Two rows of slices that share keys, of which the second starts in the middle.
    const std::vector<Slice> slices{{{0, half}, {0, keys}, {-kUnbounded, some}},
                                    {{half, 2 * half}, {keys / 3, keys}, {some, kUnbounded}},
                                    {{half, 2 * half}, {0, keys / 3}, {}},
                                    {{0, 0}, {0, keys}, {}}};
    const auto block = static_cast<std::int32_t>(random() % 2 == 0 ? 64 : 128);
    const BlockOrder order =
        random() % 2 == 0 ? BlockOrder::most_queries_first : BlockOrder::first_keys_first;
    expect_covered({slices, {}}, 2, block, order);
    const std::vector<std::int64_t> offsets{0, 1, 4};
    expect_covered({slices, offsets}, 2, block, order);
  }
}

/// Goes through the table as the kernel's tickets do and compares each turn with the additions so
/// far.
void expect_turns(const SliceList& mask, std::int32_t batch, int queries, int keys) {
  const ForwardWork work = plan_backward(mask, batch, keys, BlockOrder::first_keys_first);
  for (std::int32_t b = 0; b < batch; ++b) {
    std::map<int, int> added;  // by the first query of a block
    for (const TileEntry& entry : work.entries) {
      if (entry.batch >= 0 && entry.batch != b) continue;
      for (std::int32_t i = entry.slice_begin; i < entry.slice_end; ++i) {
        const TileSlice& s = work.slices[static_cast<std::size_t>(i)];
        const int k_end = std::min(entry.q_begin + keys, s.k_end);
        const int first = std::max(s.q_begin, entry.q_begin - s.hi);
        const int last = std::min(s.q_end - 1, k_end - 1 - s.lo);
        if (first > last) continue;
        for (int q = first / queries * queries; q <= last; q += queries) {
          int turn = 0;
          for (std::int32_t j = s.batch_begin; j < entry.slice_end; ++j) {
            turn += turns_before(work.slices[static_cast<std::size_t>(j)], j, entry.slice_begin, i,
                                 entry.q_begin, q, queries, keys);
          }
          ASSERT_EQ(turn, added[q])
              << "keys from " << entry.q_begin << " slice " << i << " q " << q;
          ++added[q];
        }
      }
    }
  }
}

TEST(BackwardWork, CountsTheTurnsOfDeterministicAdditions) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const auto below = [&](int limit) { return static_cast<std::int64_t>(random() % limit); };
  for (int i = 0; i < 2000; ++i) {
    std::vector<Slice> slices;
    const std::int64_t seq_q = 1 + below(700);
    for (std::int64_t q = 0;
         q < seq_q;) {  // rows that share keys, as layouts and documents have them
      const std::int64_t end = std::min(seq_q, q + 1 + below(400));
      const std::int64_t k = below(300);
      Slice slice{{q, end}, {k, k + below(600)}, {}};
      if (below(3) > 0) slice.band.hi = below(400) - 200;
      if (below(3) > 0) slice.band.lo = below(400) - 200;
      slices.push_back(slice);
      q = end;
    }
    const int keys = below(2) == 0 ? 64 : 128;
    const int queries = std::array{16, 64, 80, 128}[static_cast<std::size_t>(below(4))];
    const auto count = static_cast<std::int64_t>(slices.size());
    expect_turns({slices, {}}, 1, queries, keys);
    const std::vector<std::int64_t> offsets{0, count / 3, count};
    expect_turns({slices, offsets}, 2, queries, keys);
    if (HasFatalFailure()) return;
  }
}

TEST(BackwardWork, KeepsTheBlocksOfADocumentTogether) {
  const Band causal{-kUnbounded, 0};
  const std::vector<Slice> documents{{{0, 256}, {0, 256}, causal},
                                     {{256, 1000}, {256, 1000}, causal},
                                     {{1000, 1300}, {1000, 1300}, causal}};
  const ForwardWork work = plan_backward({documents, {}}, 1, 128, BlockOrder::most_queries_first);
  std::vector<int> begins;
  for (const TileEntry& entry : work.entries) begins.push_back(entry.q_begin);
  EXPECT_EQ(begins, (std::vector<int>{256, 384, 512, 640, 768, 896, 1000, 1128, 1256, 0, 128}));
}

TEST(BackwardWork, OrdersAsAsked) {
  const std::vector<Slice> later{{{0, 1000}, {0, 1000}, {0, kUnbounded}}};  // keys from q on
  const ForwardWork longest = plan_backward({later, {}}, 1, 128, BlockOrder::most_queries_first);
  EXPECT_EQ(longest.entries.front().q_begin, 896);
  EXPECT_EQ(longest.entries.back().q_begin, 0);
  const ForwardWork first = plan_backward({later, {}}, 1, 128, BlockOrder::first_keys_first);
  EXPECT_EQ(first.entries.front().q_begin, 0);
  EXPECT_EQ(first.entries.back().q_begin, 896);
}

bool covers(const std::vector<Slice>& slices, std::int64_t seq_kv, std::int32_t box) {
  const ForwardWork work = plan_backward({slices, {}}, 3, 128, BlockOrder::most_queries_first);
  return covers_all_keys(work, 3, seq_kv, 128, box);
}

TEST(BackwardWork, KnowsWhetherBlocksCoverAllKeys) {
  const Band causal{-kUnbounded, 0};
  EXPECT_TRUE(covers({{{0, 300}, {0, 300}, causal}}, 300, 64));
  EXPECT_FALSE(covers({{{0, 300}, {0, 300}, causal}}, 301, 64));
  EXPECT_FALSE(covers({{{0, 300}, {1, 300}, causal}}, 300, 64));
  EXPECT_FALSE(covers({{{0, 300}, {0, 300}, {-kUnbounded, -200}}}, 300, 64));
  EXPECT_FALSE(covers({{{0, 100}, {0, 128}, {}}, {{100, 300}, {192, 300}, {}}}, 300, 64));
  EXPECT_TRUE(covers({{{0, 192}, {0, 192}, causal}, {{192, 300}, {192, 300}, causal}}, 300, 64));
  EXPECT_FALSE(covers({{{0, 100}, {0, 100}, causal}, {{100, 300}, {100, 300}, causal}}, 300, 64));
  EXPECT_TRUE(covers({{{0, 100}, {0, 100}, causal}, {{100, 300}, {100, 300}, causal}}, 300, 1));
}

TEST(BackwardWork, CoversTheKeysOfEachBatchRow) {
  const std::vector<Slice> slices{{{0, 100}, {0, 300}, {}}, {{0, 100}, {0, 200}, {}}};
  const std::vector<std::int64_t> offsets{0, 1, 2};
  const SliceList mask{slices, offsets};
  const ForwardWork work = plan_backward(mask, 2, 128, BlockOrder::most_queries_first);
  EXPECT_FALSE(covers_all_keys(work, 2, 300, 128, 1));
  EXPECT_FALSE(covers_all_keys(work, 2, 200, 128, 1));
  const std::vector<std::int64_t> twice{0, 1, 1};
  EXPECT_FALSE(covers_all_keys(plan_backward({slices, twice}, 2, 128, BlockOrder::first_keys_first),
                               2, 300, 128, 1));
}

TEST(BackwardWork, CountsBlocksOfQueries) {
  const std::vector<Slice> causal{{{0, 1000}, {0, 1000}, {-kUnbounded, 0}}};
  std::int64_t blocks = 0;
  for (std::int64_t k = 0; k < 1000; k += 128) blocks += (1000 - k + 79) / 80;
  const ForwardWork work = plan_backward({causal, {}}, 1, 128, BlockOrder::first_keys_first);
  EXPECT_EQ(blocks_of_queries(work, 128, 80), blocks);
}

TailCut cut_of_full(std::int64_t seq_q, std::int64_t seq_kv, std::int32_t units,
                    std::int32_t last_units) {
  const std::vector<Slice> slices{{{0, seq_q}, {0, seq_kv}, {}}};
  const ForwardWork work = plan_backward({slices, {}}, 1, 128, BlockOrder::most_queries_first);
  return cut_last_keys(work, units, last_units, 128, 80, 132);
}

TEST(BackwardWork, CutsTheLastKeysWhereThatPays) {
  // 16 heads of 16k tokens: 15.5 waves of blocks, 205 blocks of queries each.
  const TailCut cut = cut_of_full(16384, 16384, 16, 16);
  EXPECT_EQ(cut.whole, 123);
  EXPECT_EQ(cut.pieces, 9);
  EXPECT_EQ(cut_of_full(16384, 132 * 128, 16, 16).pieces, 1);  // no tail
  EXPECT_EQ(cut_of_full(160, 16384, 16, 16).pieces, 1);        // short passes
  EXPECT_EQ(cut_of_full(16384, 128, 8, 8).whole, 0);
  EXPECT_EQ(cut_of_full(16384, 128, 8, 8).pieces, 16);
  EXPECT_EQ(cut_of_full(16384, 16384, 64, 8).pieces, 1);   // 62.1 waves: too little
  EXPECT_EQ(cut_of_full(32768, 32768, 16, 4).whole, 255);  // 31.03
  const std::vector<Slice> causal{{{0, 16384}, {0, 16384}, {-kUnbounded, 0}}};
  const ForwardWork work = plan_backward({causal, {}}, 1, 128, BlockOrder::most_queries_first);
  EXPECT_EQ(cut_last_keys(work, 16, 16, 128, 80, 132).pieces, 1);
}

TEST(BackwardWork, CutsEntriesIntoPiecesThatCoverEachPairOnce) {
  for (const auto& [seq_q, pieces] : {std::pair{500, 3}, {481, 4}, {80, 1}, {1000, 13}}) {
    const std::vector<Slice> slices{{{7, 7 + seq_q}, {5, 300}, {}}};
    ForwardWork work = plan_backward({slices, {}}, 1, 128, BlockOrder::most_queries_first);
    const auto whole = covered(work, 0, 128);
    cut_entries(work, {1, pieces}, 128, 80);
    EXPECT_EQ(covered(work, 0, 128), whole);
    ASSERT_EQ(work.rows(), 1 + 2 * pieces);
    EXPECT_EQ(work.entries[1].q_begin, 133);  // the first pieces of all first
    EXPECT_EQ(work.entries[2].q_begin, 261);
  }
}

TEST(BackwardWork, KeepsMoreKeysTogetherInLongerPasses) {
  for (const std::int64_t row_bytes : {512, 1024}) {
    const bool wide = row_bytes == 1024;
    EXPECT_EQ(keys_together(1000, row_bytes), 512);
    EXPECT_EQ(keys_together(2 * 1024, row_bytes), wide ? 1024 : 512);
    EXPECT_EQ(keys_together(16 * 1024, row_bytes), wide ? 2048 : 512);
    EXPECT_EQ(keys_together(32 * 1024, row_bytes), 4096);
    EXPECT_EQ(keys_together(64 * 1024, row_bytes), 8192);
    EXPECT_EQ(keys_together(std::int64_t{1} << 40, row_bytes), std::int64_t{1} << 37);
  }
}

TEST(BackwardWork, FindsTheLongestPass) {
  const std::vector<Slice> slices{{{0, 800}, {0, 256}, {}}, {{300, 400}, {128, 512}, {}}};
  const ForwardWork work = plan_backward({slices, {}}, 1, 128, BlockOrder::most_queries_first);
  EXPECT_EQ(blocks_of_queries(work, 128, 80), 10 + 12 + 2 + 2);
  EXPECT_EQ(most_blocks_of_queries(work, 128, 80), 12);
}

TEST(BackwardWork, KnowsWhetherPassesAreEqual) {
  const auto blocks = [](std::vector<Slice> slices) {
    return equal_blocks(plan_backward({slices, {}}, 1, 128, BlockOrder::most_queries_first), 128,
                        80);
  };
  EXPECT_EQ(blocks({{{0, 1000}, {0, 900}, {}}}), 13);
  EXPECT_EQ(blocks({{{100, 200}, {0, 900}, {}}, {{300, 400}, {1000, 1100}, {}}}), 2);
  EXPECT_EQ(blocks({{{100, 200}, {0, 900}, {}}, {{300, 400}, {0, 900}, {}}}), 0);
  EXPECT_EQ(blocks({{{0, 1000}, {0, 900}, {-kUnbounded, 0}}}), 0);
}

TEST(BackwardWork, LeavesOutKeysWithoutQueries) {
  const std::vector<Slice> slices{{{0, 100}, {0, 100}, {-kUnbounded, -200}},
                                  {{0, 100}, {300, 310}, {}}};
  const ForwardWork work = plan_backward({slices, {}}, 1, 128, BlockOrder::most_queries_first);
  ASSERT_EQ(work.entries.size(), 1U);
  EXPECT_EQ(work.entries.front().q_begin, 300);
}

}  // namespace
}  // namespace annulus::kernels::sm90
