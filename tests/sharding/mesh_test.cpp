#include "sharding/mesh.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/error.hpp"

namespace annulus {
namespace {

std::string message_of(std::string_view text, int ranks) {
  try {
    Mesh::parse(text, ranks);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    return error.what();
  }
  return "accepted";
}

TEST(Mesh, StandardAxesGiveWhatIsLeftToFsdp) {
  EXPECT_EQ(Mesh::standard(6).to_string(), "dp=1,fsdp=6,ep=1,tp=1,sp=1");
  EXPECT_EQ(Mesh::parse("  ", 6), Mesh::standard(6));
}

TEST(Mesh, ParsedAxesAreInStandardOrderAndOthersAreOne) {
  EXPECT_EQ(Mesh::parse("sp=4,tp=2", 8).to_string(), "dp=1,fsdp=1,ep=1,tp=2,sp=4");
  EXPECT_EQ(Mesh::parse(" sp = -1 , dp=2", 6).to_string(), "dp=2,fsdp=1,ep=1,tp=1,sp=3");
  EXPECT_EQ(Mesh::parse("sp=1", 1).ranks(), 1);
}

TEST(Mesh, RefusesWithTheValuesAndWhatIsAccepted) {
  EXPECT_EQ(message_of("sp=4,tp=2", 6),
            "mesh: dp=1,fsdp=1,ep=1,tp=2,sp=4 multiplies to 8, but there are 6 ranks; "
            "change a size, or give one as -1");
  EXPECT_EQ(message_of("sp=2", 6),
            "mesh: dp=1,fsdp=1,ep=1,tp=1,sp=2 multiplies to 2, but there are 6 ranks; change a "
            "size, or give one as -1");
  EXPECT_EQ(message_of("sp=4,tp=-1", 6),
            "mesh: dp=1,fsdp=1,ep=1,tp=-1,sp=4 cannot fill 6 ranks: the given sizes multiply to "
            "4, which does not divide 6");
  EXPECT_EQ(message_of("ps=4", 4), "mesh: unknown axis 'ps'; the axes are dp, fsdp, ep, tp, sp");
  EXPECT_EQ(message_of("sp=4,", 4), "mesh: '' is not AXIS=SIZE, as in sp=4,tp=2");
  EXPECT_EQ(message_of("sp=two", 2), "mesh: size 'two' of axis sp is not an integer");
  EXPECT_EQ(message_of("sp=99999999999", 2),
            "mesh: size '99999999999' of axis sp is not an integer");
  EXPECT_EQ(message_of("sp=0", 1),
            "mesh: axis sp has size 0; sizes are 1 or more, or -1 for what is left");
  EXPECT_EQ(message_of("sp=2,sp=2", 4), "mesh: axis sp is given twice");
  EXPECT_EQ(message_of("sp=-1,tp=-1", 4),
            "mesh: dp=1,fsdp=1,ep=1,tp=-1,sp=-1 has more than one -1; only one axis can take what "
            "is left");
}

TEST(Mesh, ProductsThatOverflowAreRefused) {
  EXPECT_THROW(Mesh::parse("sp=2147483647,tp=2147483647,dp=2147483647,ep=2", 4), Error);
  EXPECT_THROW(Mesh({{"x", 1 << 30}, {"y", 1 << 30}, {"z", 1 << 4}}, 1), Error);
}

TEST(Mesh, ConstructorTakesAnyNamesAndNoOthers) {
  const Mesh mesh({{"node", 2}, {"lane_0", -1}}, 8);
  EXPECT_EQ(mesh.size("lane_0"), 4);
  EXPECT_FALSE(mesh.has("sp"));
  EXPECT_THROW(mesh.size("sp"), Error);
  EXPECT_THROW(Mesh({{"0node", 2}}, 2), Error);
  EXPECT_THROW(Mesh({{"none", 2}}, 2), Error);
  EXPECT_THROW(Mesh({{"", 2}}, 2), Error);
  EXPECT_THROW(Mesh({}, 1), Error);
  EXPECT_THROW(Mesh({{"x", 1}}, 0), Error);
}

TEST(Mesh, LastAxisIsFastest) {
  const Mesh mesh = Mesh::parse("dp=2,sp=3", 6);
  EXPECT_EQ(mesh.coordinates(4), (std::vector<int>{1, 0, 0, 0, 1}));
  EXPECT_EQ(mesh.group(4, {"sp"}), (std::vector<int>{3, 4, 5}));
  EXPECT_EQ(mesh.group(4, {"dp"}), (std::vector<int>{1, 4}));
  EXPECT_THROW(mesh.coordinates(6), Error);
  EXPECT_THROW(mesh.coordinates(-1), Error);
}

TEST(Mesh, TupleNumbersItsFirstAxisSlowest) {
  const Mesh mesh = Mesh::parse("dp=2,fsdp=3", 6);
  // rank = dp · 3 + fsdp, and (fsdp, dp) numbers fsdp · 2 + dp.
  EXPECT_EQ(mesh.group(0, {"fsdp", "dp"}), (std::vector<int>{0, 3, 1, 4, 2, 5}));
  EXPECT_EQ(mesh.group(5, {"dp", "fsdp"}), (std::vector<int>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(mesh.group_index(4, {"fsdp", "dp"}), 3);
}

/// All axis tuples of up to two axes, and none.
std::vector<AxisTuple> tuples_of(const Mesh& mesh) {
  std::vector<AxisTuple> tuples = {{}};
  for (const MeshAxis& a : mesh.axes()) {
    tuples.push_back({a.name});
    for (const MeshAxis& b : mesh.axes()) {
      if (a.name != b.name) tuples.push_back({a.name, b.name});
    }
  }
  return tuples;
}

void expect_groups_partition_the_ranks(const Mesh& mesh, const AxisTuple& axes) {
  for (int rank = 0; rank < mesh.ranks(); ++rank) {
    const std::vector<int> group = mesh.group(rank, axes);
    ASSERT_EQ(static_cast<int>(group.size()), mesh.size(axes));
    ASSERT_EQ(group[static_cast<std::size_t>(mesh.group_index(rank, axes))], rank);
    for (const int member : group) ASSERT_EQ(mesh.group(member, axes), group);
  }
}

TEST(Mesh, EveryMeshOfEveryRankCountIsConsistent) {
  for (int ranks = 1; ranks <= 12; ++ranks) {
    for (int a = 1; a <= ranks; ++a) {
      for (int b = 1; a * b <= ranks; ++b) {
        if (ranks % (a * b) != 0) continue;
        const Mesh mesh({{"a", a}, {"b", b}, {"c", -1}}, ranks);
        for (int rank = 0; rank < ranks; ++rank) {
          ASSERT_EQ(mesh.rank_at(mesh.coordinates(rank)), rank);
          ASSERT_EQ(mesh.coordinate(rank, "b"), mesh.coordinates(rank)[1]);
        }
        for (const AxisTuple& axes : tuples_of(mesh)) {
          expect_groups_partition_the_ranks(mesh, axes);
        }
      }
    }
  }
}

TEST(Mesh, RankAtChecksItsCoordinates) {
  const Mesh mesh({{"a", 2}, {"b", 3}}, 6);
  EXPECT_EQ(mesh.rank_at(std::vector<int>{1, 2}), 5);
  EXPECT_THROW(mesh.rank_at(std::vector<int>{1}), Error);
  EXPECT_THROW(mesh.rank_at(std::vector<int>{1, 3}), Error);
  EXPECT_THROW(mesh.rank_at(std::vector<int>{-1, 0}), Error);
}

}  // namespace
}  // namespace annulus
