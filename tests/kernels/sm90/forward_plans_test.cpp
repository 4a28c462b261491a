#include "kernels/sm90/forward_plans.hpp"

#include <gtest/gtest.h>

#include <vector>

namespace annulus::kernels::sm90 {
namespace {

std::shared_ptr<const ForwardPlan> plan(const std::vector<Slice>& slices, std::int64_t batch,
                                        std::int64_t seq_q, const TileShape& tile,
                                        const std::vector<std::int64_t>& offsets = {}) {
  static const char byte = 0;
  ForwardSegment segment;
  segment.k = {&byte, DType::bf16, Shape{batch, seq_q, 1, 64}};
  segment.v = segment.k;
  segment.mask = {slices, offsets};
  const std::vector<ForwardSegment> segments{segment};
  return forward_plan(segments, batch, seq_q, tile);
}

TEST(ForwardPlans, AreMadeOnceForEachMaskAndShape) {
  const std::vector<Slice> causal{{{0, 1000}, {0, 1000}, {-kUnbounded, 0}}};
  const std::vector<Slice> window{{{0, 1000}, {0, 1000}, {-10, 0}}};
  const auto first = plan(causal, 2, 1000, {128});
  EXPECT_EQ(first->pairs, 36.0 * 128 * 128);
  EXPECT_EQ(first->work.tiles, 8);
  EXPECT_EQ(plan(std::vector<Slice>(causal), 2, 1000, {128}), first);
  EXPECT_NE(plan(window, 2, 1000, {128}), first);
  EXPECT_NE(plan(causal, 3, 1000, {128}), first);
  EXPECT_NE(plan(causal, 2, 1001, {128}), first);
  EXPECT_NE(plan(causal, 2, 1000, {192}), first);
  EXPECT_NE(plan(causal, 2, 1000, {128, 64}), first);
  EXPECT_NE(plan(causal, 2, 1000, {128, 128, true}), first);
  EXPECT_NE(plan(causal, 2, 1000, {128}, {0, 1, 1}), first);
  EXPECT_EQ(plan(causal, 2, 1000, {128}), first);
}

TEST(ForwardPlans, OldOnesAreMadeAnew) {
  std::vector<Slice> causal{{{0, 1000}, {0, 1000}, {-kUnbounded, 0}}};
  const auto first = plan(causal, 1, 1000, {128});
  for (std::int64_t seq = 1; seq <= 100; ++seq) plan(causal, 1, seq, {128});
  const auto again = plan(causal, 1, 1000, {128});
  EXPECT_NE(again, first);
  EXPECT_EQ(again->pairs, first->pairs);
}

}  // namespace
}  // namespace annulus::kernels::sm90
