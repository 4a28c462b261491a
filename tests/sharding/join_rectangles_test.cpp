#include "sharding/join_rectangles.hpp"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "sharding/attention_plan.hpp"

namespace annulus {
namespace {

// Times that each pair of a batch row is kept.
std::map<std::pair<std::int64_t, std::int64_t>, int> pairs_of(const MaskSlices& mask,
                                                              std::int64_t b) {
  std::map<std::pair<std::int64_t, std::int64_t>, int> pairs;
  for (const Slice& slice : mask.view().of_batch(b)) {
    for (std::int64_t q = slice.q.begin; q < slice.q.end; ++q) {
      for (std::int64_t k = slice.k.begin; k < slice.k.end; ++k) {
        if (slice.keeps(q, k)) ++pairs[{q, k}];
      }
    }
  }
  return pairs;
}

// A grid of rectangles, some of which are left out or cut by a band.
std::vector<Slice> random_grid(std::mt19937_64& random) {
  const auto below = [&](std::uint64_t n) { return static_cast<std::int64_t>(random() % n); };
  std::vector<Span> sides[2];
  for (std::vector<Span>& side : sides) {
    for (std::int64_t begin = 0, i = 0; i < 4; ++i) {
      const std::int64_t end = begin + 1 + below(5);
      side.push_back({begin + (below(4) == 0 ? 1 : 0), end});
      begin = end;
    }
  }
  std::vector<Slice> slices;
  for (const Span q : sides[0]) {
    for (const Span k : sides[1]) {
      const std::int64_t kind = below(6);
      if (kind == 0 || q.empty() || k.empty()) continue;
      const Band wide{q.begin == 0 ? -kUnbounded : -50, 50};  // cuts nothing
      slices.push_back({q, k, kind == 1 ? Band{-kUnbounded, below(6) - 3} : wide});
    }
  }
  std::shuffle(slices.begin(), slices.end(), random);
  return slices;
}

TEST(JoinRectangles, KeepsEveryPairOnce) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 200; ++round) {
    MaskSlices mask;
    mask.batch_offsets.push_back(0);
    for (int b = 0; b < 2; ++b) {
      const std::vector<Slice> row = random_grid(random);
      mask.slices.insert(mask.slices.end(), row.begin(), row.end());
      mask.batch_offsets.push_back(static_cast<std::int64_t>(mask.slices.size()));
    }
    const MaskSlices joined = join_rectangles(mask);
    ASSERT_EQ(joined.batch_offsets.size(), 3U);
    EXPECT_LE(joined.slices.size(), mask.slices.size());
    for (int b = 0; b < 2; ++b) EXPECT_EQ(pairs_of(joined, b), pairs_of(mask, b)) << round;
  }
}

TEST(JoinRectangles, LeavesWhatABandCuts) {
  const Band causal{-kUnbounded, 0};
  const MaskSlices mask{{{{0, 8}, {0, 8}, causal}, {{8, 16}, {0, 8}, causal}}, {}};
  const MaskSlices joined = join_rectangles(mask);
  ASSERT_EQ(joined.slices.size(), 2U);
  EXPECT_EQ(joined.slices[0], mask.slices[0]);
  EXPECT_EQ(joined.slices[1].band, Band{});  // the second is whole
}

// The two chunks of a zigzag rank, against the two of another; the last rank's adjoin.
TEST(JoinRectangles, MakesOnePassOfAStage) {
  for (const bool causal : {false, true}) {
    auto request = std::make_shared<PlanRequest>();
    request->q_layout = request->kv_layout = SequenceLayout::zigzag(64, 4);
    request->stage_rows = 0;
    AttentionMask mask;
    mask.causal = causal;
    request->mask = make_slices(mask, 1, 64, 64);
    for (int rank = 0; rank < 4; ++rank) {
      const AttentionPlan plan(request, rank);
      ASSERT_EQ(plan.stages().size(), 4U);
      for (const Stage& stage : plan.stages()) {
        const std::size_t expected = causal && stage.number == 0 && rank < 3 ? 3 : 1;
        EXPECT_EQ(stage.slices.slices.size(), expected) << rank << ", stage " << stage.number;
      }
    }
  }
}

}  // namespace
}  // namespace annulus
