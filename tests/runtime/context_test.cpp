#include "runtime/context.hpp"

#include <gtest/gtest.h>

#include "tests/sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

TEST(Context, NumbersNodesByTheirLowestRank) {
  run_ranks(5,
            [](Communicator& ranks) {
              const Context context(ranks);
              EXPECT_EQ(context.nodes(), 3);
              EXPECT_EQ(context.node(), ranks.rank() / 2);
              EXPECT_EQ(context.local_rank(), ranks.rank() % 2);
              EXPECT_EQ(context.ranks_on_node(), ranks.rank() == 4 ? 1 : 2);
              EXPECT_EQ(context.node_of(3), 1);
              EXPECT_FALSE(context.mpi().has_value());
            },
            {.ranks_per_node = 2});
}

TEST(Context, WorksOverThreads) {
  run_ranks(6, [](Communicator& ranks) {
    Context context(ranks);
    const Mesh mesh = Mesh::parse("sp=3,tp=2", 6);
    Communicator& heads = context.along(mesh, {"tp"});
    EXPECT_EQ(heads.size(), 2);
    EXPECT_EQ(heads.rank(), mesh.coordinate(ranks.rank(), "tp"));
    EXPECT_EQ(context.along(mesh, {"tp", "sp"}).rank(),
              mesh.group_index(ranks.rank(), {"tp", "sp"}));
  });
}

}  // namespace
}  // namespace annulus::testing
