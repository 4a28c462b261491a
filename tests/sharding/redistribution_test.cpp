#include "sharding/redistribution.hpp"

#include <gtest/gtest.h>

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "kernels/error.hpp"
#include "tests/sharding/random_layout.hpp"

namespace annulus {
namespace {

/// A shard whose elements are their own global numbers; -1 is poison.
using Numbers = std::vector<std::int64_t>;

/// Calls `visit(offset in a shard of shape a, offset in one of shape b)` for all that moves.
template <typename Visit>
void for_each_moved(const ShardTransfer& transfer, const Shape& a, const Shape& b, int dim,
                    std::int64_t at_a, std::int64_t at_b, const Visit& visit) {
  if (dim == a.rank()) return visit(at_a, at_b);
  for (const Segment1d& part : transfer.segments[static_cast<std::size_t>(dim)]) {
    ASSERT_LE(part.from + part.size, a[dim]);
    ASSERT_LE(part.to + part.size, b[dim]);
    for (std::int64_t i = 0; i < part.size; ++i) {
      for_each_moved(transfer, a, b, dim + 1, at_a * a[dim] + part.from + i,
                     at_b * b[dim] + part.to + i, visit);
    }
  }
}

Numbers numbers_of(const TensorLayout& layout, int rank) {
  const Shape local = layout.local_shape(rank);
  Numbers numbers;
  for (std::int64_t i = 0; i < local.elements(); ++i) {
    std::int64_t rest = i, number = 0, stride = 1;
    for (int dim = local.rank() - 1; dim >= 0; --dim) {
      number += layout.global_index(rank, dim, rest % local[dim]) * stride;
      stride *= layout.global_shape()[dim];
      rest /= local[dim];
    }
    numbers.push_back(number);
  }
  return numbers;
}

/// Plays one change of layout; returns how many elements went between ranks.
std::int64_t play(const TensorLayout& from, const TensorLayout& to, int target) {
  std::int64_t moved = 0;
  Numbers shard(static_cast<std::size_t>(to.local_shape(target).elements()), -1);
  for (const ShardTransfer& receive : plan_redistribution(from, to, target).receives) {
    const Numbers old = numbers_of(from, receive.peer);
    for_each_moved(receive, from.local_shape(receive.peer), to.local_shape(target), 0, 0, 0,
                   [&](std::int64_t a, std::int64_t b) {
                     std::int64_t& place = shard[static_cast<std::size_t>(b)];
                     ASSERT_EQ(place, -1) << "received twice";
                     place = old[static_cast<std::size_t>(a)];
                     moved += receive.peer != target ? 1 : 0;
                   });
  }
  EXPECT_EQ(shard, numbers_of(to, target));
  return moved;
}

/// Elements of the new shard that the rank does not hold yet.
std::int64_t missing(const TensorLayout& from, const TensorLayout& to, int rank) {
  const Numbers old = numbers_of(from, rank);
  const std::set<std::int64_t> held(old.begin(), old.end());
  const Numbers wanted = numbers_of(to, rank);
  return std::count_if(wanted.begin(), wanted.end(),
                       [&](std::int64_t number) { return !held.contains(number); });
}

/// A send of one rank is the receive of the other, in the same pieces.
void expect_sends_match_receives(const TensorLayout& from, const TensorLayout& to) {
  for (int a = 0; a < from.mesh().ranks(); ++a) {
    for (const ShardTransfer& send : plan_redistribution(from, to, a).sends) {
      const auto transfer = transfer_between(from, to, a, send.peer);
      ASSERT_TRUE(transfer.has_value());
      ASSERT_EQ(transfer->segments, send.segments);
      ASSERT_GT(send.message_shape().elements(), 0);
    }
  }
}

TEST(Redistribution, RandomLayoutsMoveWhatIsMissingOnce) {
  const std::uint64_t seed = testing::fresh_seed();
  std::mt19937_64 random(seed);
  for (int trial = 0; trial < 600; ++trial) {
    const int ranks = 1 + trial % 8;
    const Shape shape = testing::random_shape(random);
    const TensorLayout from = testing::random_layout(shape, ranks, random);
    const TensorLayout to = testing::random_layout(shape, ranks, random);
    SCOPED_TRACE(
        fmt::format("seed {} trial {}: {} -> {}", seed, trial, from.to_string(), to.to_string()));
    for (int rank = 0; rank < ranks; ++rank) {
      ASSERT_EQ(play(from, to, rank), missing(from, to, rank)) << "rank " << rank;
    }
    expect_sends_match_receives(from, to);
    if (HasFatalFailure() || HasNonfatalFailure()) return;
  }
}

TEST(Redistribution, ReplicasShareTheSending) {
  const Mesh mesh = Mesh::parse("tp=2,sp=2", 4);
  const TensorLayout from({8, 4}, NamedSharding(mesh, PartitionSpec::parse("(sp)")));
  const TensorLayout to({8, 4}, NamedSharding(mesh, PartitionSpec()));
  // Each rank lacks one half, and gets it from its neighbour along sp.
  for (int rank = 0; rank < 4; ++rank) {
    const Redistribution plan = plan_redistribution(from, to, rank);
    ASSERT_EQ(plan.sends.size(), 2U);
    for (const ShardTransfer& send : plan.sends) {
      EXPECT_EQ(mesh.coordinate(send.peer, "tp"), mesh.coordinate(rank, "tp"));
    }
  }
}

TEST(Redistribution, NothingMovesWhereEachRankHoldsWhatItNeeds) {
  const Mesh mesh = Mesh::parse("tp=2,sp=2", 4);
  const TensorLayout whole({8, 4}, NamedSharding(mesh, PartitionSpec()));
  const TensorLayout cut({8, 4}, NamedSharding(mesh, PartitionSpec::parse("(sp, tp)")));
  for (int rank = 0; rank < 4; ++rank) {
    const Redistribution plan = plan_redistribution(whole, cut, rank);
    ASSERT_EQ(plan.sends.size(), 1U);
    EXPECT_EQ(plan.sends[0].peer, rank);
  }
}

TEST(Redistribution, TouchingRunsBecomeOneSegment) {
  const Mesh mesh = Mesh::parse("sp=2", 2);
  const TensorLayout from({8}, NamedSharding(mesh, PartitionSpec::parse("(sp)")));
  const TensorLayout to = from.with_runs(0, {{{0, 2}, {2, 6}}, {{6, 8}}});
  const auto kept = transfer_between(from, to, 0, 0);
  ASSERT_TRUE(kept.has_value());
  EXPECT_EQ(kept->segments[0], (std::vector<Segment1d>{{0, 0, 4}}));
}

TEST(Redistribution, ManyRanksPlanQuickly) {
  const int ranks = 4096;
  const Mesh mesh = Mesh::parse("dp=2,tp=8,sp=-1", ranks);
  const Shape shape = {4, 1 << 20, 64, 128};
  const TensorLayout from(shape,
                          NamedSharding(mesh, PartitionSpec::parse("((fsdp,dp), sp, tp, -)")));
  const TensorLayout to(shape, NamedSharding(mesh, PartitionSpec::parse("(dp, -, (sp,tp))")));
  const Redistribution plan = plan_redistribution(from, to, 1234);
  std::int64_t received = 0;
  for (const ShardTransfer& receive : plan.receives) {
    received += receive.message_shape().elements();
  }
  EXPECT_EQ(received, to.local_shape(1234).elements());
}

TEST(Redistribution, RefusesOtherShapesAndRanks) {
  const auto layout = [](const Shape& shape, int ranks) {
    return TensorLayout(shape, NamedSharding(Mesh::standard(ranks), PartitionSpec()));
  };
  EXPECT_THROW(plan_redistribution(layout({4}, 2), layout({5}, 2), 0), Error);
  EXPECT_THROW(plan_redistribution(layout({4}, 2), layout({4}, 4), 0), Error);
}

}  // namespace
}  // namespace annulus
