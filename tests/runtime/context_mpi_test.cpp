#include "runtime/context.hpp"

#include <gtest/gtest.h>
#include <mpi.h>

#include <vector>

#include "tests/sharding/communicator_checks.hpp"

namespace annulus::testing {
namespace {

int world_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

/// Ranks of the mesh group as its communicator has them.
std::vector<int> members(Context& context, Communicator& group) {
  std::vector<int> ranks(static_cast<std::size_t>(group.size()));
  const int mine = context.rank();
  group.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(ranks)));
  return ranks;
}

TEST(Context, HasACommunicatorForEveryTupleOfAxes) {
  Context context;
  const int ranks = context.size();
  ASSERT_EQ(ranks, world_size());
  const int fast = ranks % 2 == 0 ? 2 : 1;
  const Mesh mesh({{"dp", 1}, {"fsdp", ranks / fast}, {"sp", fast}}, ranks);
  const std::vector<AxisTuple> tuples = {{},           {"sp"},         {"fsdp"},
                                         {"dp", "sp"}, {"sp", "fsdp"}, {"fsdp", "dp", "sp"}};
  for (const AxisTuple& axes : tuples) {
    Communicator& group = context.along(mesh, axes);
    EXPECT_EQ(members(context, group), mesh.group(context.rank(), axes));
    EXPECT_EQ(group.rank(), mesh.group_index(context.rank(), axes));
    EXPECT_EQ(&group, &context.along(mesh, axes));
  }
  // An axis of one rank changes nothing.
  EXPECT_EQ(&context.along(mesh, {"sp"}), &context.along(mesh, {"dp", "sp"}));
  check_exchanges_in_flight(context.along(mesh, {"sp"}), 2);
  EXPECT_EQ(context.bytes_sent(), context.along(mesh, {"sp"}).bytes_sent());
}

TEST(Context, RefusesAMeshOfOtherRanks) {
  Context context;
  const Mesh mesh = Mesh::standard(context.size() + 1);
  EXPECT_THROW(context.along(mesh, {"fsdp"}), Error);
}

TEST(Context, TakesTheCallersCommunicator) {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm half = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, rank % 2, rank, &half);
  {
    Context context(MpiHandle{MPI_Comm_c2f(half)});
    EXPECT_EQ(context.rank(), rank / 2);
    EXPECT_EQ(context.size(), (world_size() + 1 - rank % 2) / 2);
    check_exchanges_in_flight(context.world(), 2);
  }
  MPI_Comm_free(&half);
  int finalized = 1;
  MPI_Finalized(&finalized);
  EXPECT_EQ(finalized, 0);
}

TEST(Context, KnowsItsNode) {
  Context context;
  EXPECT_EQ(context.nodes(), 1);
  EXPECT_EQ(context.node(), 0);
  EXPECT_EQ(context.local_rank(), context.rank());
  EXPECT_EQ(context.ranks_on_node(), context.size());
}

}  // namespace
}  // namespace annulus::testing
