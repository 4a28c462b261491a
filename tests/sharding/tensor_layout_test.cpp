#include "sharding/tensor_layout.hpp"

#include <gtest/gtest.h>

#include "kernels/error.hpp"
#include "sharding/head_layout.hpp"

namespace annulus {
namespace {

TensorLayout layout_of(const Shape& shape, std::string_view mesh, int ranks,
                       std::string_view spec) {
  return {shape, NamedSharding(Mesh::parse(mesh, ranks), PartitionSpec::parse(spec))};
}

std::string message_of(const TensorLayout& layout, int dim, std::vector<Runs> runs) {
  try {
    layout.with_runs(dim, std::move(runs));
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    return error.what();
  }
  return "accepted";
}

TEST(TensorLayout, DefaultIsTheBlockOfTheSharding) {
  const TensorLayout layout = layout_of({2, 7}, "sp=3", 3, "(-, sp)");
  EXPECT_EQ(layout.local_shape(0), (Shape{2, 3}));
  EXPECT_EQ(layout.runs(1, 1), (Runs{{3, 5}}));
  EXPECT_EQ(layout.global_index(2, 1, 1), 6);
  EXPECT_EQ(layout.to_string(), "[2, 7] (-, sp) over dp=1,fsdp=1,ep=1,tp=1,sp=3");
}

TEST(TensorLayout, MoreRanksThanTokens) {
  const TensorLayout layout = layout_of({1, 2}, "sp=4", 4, "(-, sp)");
  EXPECT_EQ(layout.local_shape(3), (Shape{1, 0}));
  EXPECT_TRUE(layout.runs(3, 1).empty());
}

TEST(TensorLayout, ADealtDimension) {
  const TensorLayout zigzag =
      layout_of({2, 8}, "sp=2", 2, "(-, sp)").with_runs(1, {{{0, 2}, {6, 8}}, {{2, 6}}});
  EXPECT_EQ(zigzag.local_shape(0), (Shape{2, 4}));
  EXPECT_EQ(zigzag.global_index(0, 1, 1), 1);
  EXPECT_EQ(zigzag.global_index(0, 1, 2), 6);
  EXPECT_THROW(zigzag.global_index(0, 1, 4), Error);
  EXPECT_FALSE(zigzag.shares(1));
}

TEST(TensorLayout, KvHeadsThatSeveralRanksNeed) {
  const HeadLayout heads(9, 3, 2);
  const TensorLayout layout =
      layout_of({1, 4, 3, 8}, "tp=2", 2, "(-, -, tp)").with_runs(2, heads.kv_runs());
  EXPECT_EQ(layout.local_shape(0), (Shape{1, 4, 2, 8}));
  EXPECT_EQ(layout.runs(1, 2), (Runs{{1, 3}}));
  EXPECT_TRUE(layout.shares(2));
}

TEST(TensorLayout, AllOnOneRank) {
  const TensorLayout layout = TensorLayout::only_on(1, {2, 8}, Mesh::parse("sp=2", 2));
  EXPECT_EQ(layout.local_shape(0), (Shape{0, 0}));
  EXPECT_EQ(layout.local_shape(1), (Shape{2, 8}));
  EXPECT_THROW(TensorLayout::only_on(2, {2, 8}, Mesh::parse("sp=2", 2)), Error);
  EXPECT_NE(message_of(layout, 1, {{{0, 8}}}), "accepted");
}

TEST(TensorLayout, RefusesRunsThatDoNotMakeUpTheDimension) {
  const TensorLayout layout = layout_of({2, 8}, "sp=2", 2, "(-, sp)");
  EXPECT_EQ(message_of(layout, 1, {{{0, 3}}, {{4, 8}}}),
            "layout: no part holds index 3 of dimension 1");
  EXPECT_EQ(message_of(layout, 1, {{{0, 3}, {2, 4}}, {{4, 8}}}),
            "layout: run 2..4 of dimension 1 overlaps another or leaves 0..8");
  EXPECT_EQ(message_of(layout, 1, {{{0, 4}}, {{4, 9}}}),
            "layout: run 4..9 of dimension 1 overlaps another or leaves 0..8");
  EXPECT_EQ(message_of(layout, 1, {{{-1, 4}}, {{4, 8}}}),
            "layout: run -1..4 of dimension 1 overlaps another or leaves 0..8");
  EXPECT_EQ(message_of(layout, 1, {{{0, 8}}}),
            "layout: runs for 1 parts of dimension 1, which [2, 8] (-, sp) over "
            "dp=1,fsdp=1,ep=1,tp=1,sp=2 cuts in 2");
  EXPECT_NE(message_of(layout, 2, {{{0, 4}}, {{4, 8}}}), "accepted");
  EXPECT_EQ(message_of(layout, 1, {{{0, 8}, {3, 3}}, {}}), "accepted");
}

}  // namespace
}  // namespace annulus
