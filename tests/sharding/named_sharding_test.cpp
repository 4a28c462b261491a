#include "sharding/named_sharding.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/error.hpp"

namespace annulus {
namespace {

TEST(SplitEvenly, FirstPartsAreLarger) {
  EXPECT_EQ(split_evenly(10, 4, 0), (Span{0, 3}));
  EXPECT_EQ(split_evenly(10, 4, 1), (Span{3, 6}));
  EXPECT_EQ(split_evenly(10, 4, 2), (Span{6, 8}));
  EXPECT_EQ(split_evenly(10, 4, 3), (Span{8, 10}));
}

TEST(SplitEvenly, FewerElementsThanParts) {
  EXPECT_EQ(split_evenly(2, 4, 1), (Span{1, 2}));
  EXPECT_EQ(split_evenly(2, 4, 3), (Span{2, 2}));
  EXPECT_EQ(split_evenly(0, 3, 2), (Span{0, 0}));
}

TEST(SplitEvenly, PartsCoverEveryElementOnceAndPartHoldingInverts) {
  for (std::int64_t size = 0; size <= 40; ++size) {
    for (std::int64_t parts = 1; parts <= 9; ++parts) {
      std::int64_t next = 0;
      for (std::int64_t part = 0; part < parts; ++part) {
        const Span span = split_evenly(size, parts, part);
        ASSERT_EQ(span.begin, next);
        ASSERT_LE(span.size() - size / parts, 1);
        ASSERT_GE(span.size(), size / parts);
        for (next = span.begin; next < span.end; ++next) {
          ASSERT_EQ(part_holding(size, parts, next), part);
        }
      }
      ASSERT_EQ(next, size);
    }
  }
}

TEST(SplitEvenly, SizesBeyondThirtyTwoBits) {
  const std::int64_t size = (std::int64_t{1} << 60) + 3;
  EXPECT_EQ(split_evenly(size, 4096, 4095).end, size);
  EXPECT_EQ(part_holding(size, 4096, size - 1), 4095);
}

TEST(SplitEvenly, RefusesWhatDoesNotExist) {
  EXPECT_THROW(split_evenly(4, 2, 2), Error);
  EXPECT_THROW(split_evenly(4, 2, -1), Error);
  EXPECT_THROW(part_holding(4, 2, 4), Error);
  EXPECT_THROW(part_holding(0, 2, 0), Error);
}

TEST(NamedSharding, BlocksOfABthdTensor) {
  const NamedSharding sharding(Mesh::parse("dp=2,sp=3", 6),
                               PartitionSpec::parse("((fsdp,dp), sp, tp, -)"));
  const Shape shape = {3, 7, 4, 64};
  EXPECT_EQ(sharding.block(0, shape), (Block{{0, 2}, {0, 3}, {0, 4}, {0, 64}}));
  EXPECT_EQ(sharding.block(4, shape), (Block{{2, 3}, {3, 5}, {0, 4}, {0, 64}}));
  EXPECT_EQ(sharding.local_shape(4, shape), (Shape{1, 2, 4, 64}));
  EXPECT_EQ(sharding.parts(1), 3);
  EXPECT_EQ(sharding.part(4, 1), 1);
}

TEST(NamedSharding, TupleCutsInItsOwnOrder) {
  const Mesh mesh = Mesh::parse("dp=2,fsdp=2", 4);
  const NamedSharding sharding(mesh, PartitionSpec::parse("((fsdp,dp))"));
  // rank 1 stands at fsdp=1, dp=0: part 2.
  EXPECT_EQ(sharding.block(1, {8}), (Block{{4, 6}}));
  EXPECT_EQ(sharding.block(2, {8}), (Block{{2, 4}}));
}

TEST(NamedSharding, MoreRanksThanTokens) {
  const NamedSharding sharding(Mesh::parse("sp=4", 4), PartitionSpec::parse("(-, sp)"));
  EXPECT_EQ(sharding.local_shape(0, {1, 1}), (Shape{1, 1}));
  EXPECT_EQ(sharding.local_shape(3, {1, 1}), (Shape{1, 0}));
}

TEST(NamedSharding, ReplicasDifferAlongUnusedAxes) {
  const NamedSharding sharding(Mesh::parse("tp=2,sp=3", 6), PartitionSpec::parse("(-, sp)"));
  EXPECT_EQ(sharding.replicas(4), (std::vector<int>{1, 4}));
  const NamedSharding whole(Mesh::parse("tp=2,sp=3", 6), PartitionSpec());
  EXPECT_EQ(whole.replicas(4), (std::vector<int>{0, 1, 2, 3, 4, 5}));
}

TEST(NamedSharding, RefusesUnknownAxesAndShortShapes) {
  const Mesh mesh = Mesh::parse("sp=2", 2);
  EXPECT_THROW(NamedSharding(mesh, PartitionSpec::parse("(foo)")), Error);
  const NamedSharding sharding(mesh, PartitionSpec::parse("(-, sp)"));
  EXPECT_THROW(sharding.block(0, {4}), Error);
}

/// How many ranks hold element `index` of `shape`.
int holders(const NamedSharding& sharding, const Shape& shape,
            const std::vector<std::int64_t>& index) {
  int count = 0;
  for (int rank = 0; rank < sharding.mesh().ranks(); ++rank) {
    const Block block = sharding.block(rank, shape);
    bool inside = true;
    for (std::size_t d = 0; d < block.size(); ++d) inside = inside && block[d].contains(index[d]);
    count += inside ? 1 : 0;
  }
  return count;
}

TEST(NamedSharding, EveryElementIsHeldByEachReplicaOnce) {
  const Mesh mesh({{"a", 2}, {"b", 3}, {"c", 2}}, 12);
  for (const std::string_view text :
       {"()", "(a)", "(-, b)", "((b,a), c)", "((a,b,c))", "(c, (b,a))"}) {
    const NamedSharding sharding(mesh, PartitionSpec::parse(text));
    for (const Shape shape : {Shape{5, 7}, Shape{1, 2}, Shape{12, 1}}) {
      const int copies = static_cast<int>(sharding.replicas(0).size());
      for (std::int64_t i = 0; i < shape[0]; ++i) {
        for (std::int64_t j = 0; j < shape[1]; ++j) {
          ASSERT_EQ(holders(sharding, shape, {i, j}), copies) << text;
        }
      }
    }
  }
}

}  // namespace
}  // namespace annulus
