#include "sharding/stable_sharding.hpp"

#include <gtest/gtest.h>

#include "kernels/error.hpp"

namespace annulus {
namespace {

const PartitionSpec kState = PartitionSpec::parse("((fsdp,dp), sp, tp, -)");

Mesh tp2_sp4() { return Mesh::parse("tp=2,sp=4", 8); }

/// Text of the result, or "absent".
std::string stable(const std::optional<PartitionSpec>& state,
                   const StableShardingOptions& options = {}) {
  const auto spec = create_stable_sharding(state, tp2_sp4(), options);
  return spec ? spec->to_string() : "absent";
}

std::string corrected(const Shape& shape, std::string_view spec) {
  return corrected_spec(shape, PartitionSpec::parse(spec), tp2_sp4()).to_string();
}

TEST(CorrectedSpec, EmptyStaysEmpty) { EXPECT_EQ(corrected({2, 8}, "()"), "()"); }

TEST(CorrectedSpec, ShortSpecsArePaddedAndLongOnesCut) {
  EXPECT_EQ(corrected({4, 8, 3}, "(tp)"), "(tp, -, -)");
  EXPECT_EQ(corrected({4}, "(tp, sp)"), "(tp)");
}

TEST(CorrectedSpec, EntriesAreDroppedWhole) {
  EXPECT_EQ(corrected({4, 8}, "(sp, foo)"), "(sp, -)");
  EXPECT_EQ(corrected({6, 8}, "(sp, tp)"), "(-, tp)");
  // 4 is divisible by |tp| = 2 but not by |tp|·|sp| = 8.
  EXPECT_EQ(corrected({4, 8}, "((tp,sp), dp)"), "(-, dp)");
  EXPECT_EQ(corrected({8, 8}, "((dp,foo), sp)"), "(-, sp)");
}

TEST(CorrectedSpec, AxesOfSizeOneAndExtentZeroStay) {
  EXPECT_EQ(corrected({3, 5}, "(dp, (fsdp,ep))"), "(dp, (fsdp,ep))");
  EXPECT_EQ(corrected({0, 5}, "(sp, tp)"), "(sp, -)");
}

TEST(CorrectedSpec, NothingSplitIsEmpty) {
  EXPECT_EQ(corrected({3, 5}, "(sp, tp)"), "()");
  EXPECT_EQ(corrected({3, 5}, "(-, -)"), "()");
}

TEST(StableSharding, StateAlone) {
  const std::string state = "((fsdp,dp), sp, tp, -)";
  EXPECT_EQ(stable(kState), state);
  EXPECT_EQ(stable(kState, {.dep = false}), state);
  EXPECT_EQ(stable(kState, {.clone = PartitionSpec::parse("(dp, -, sp, -)")}), state);
}

TEST(StableSharding, AbsentStateOrDependency) {
  EXPECT_EQ(stable(std::nullopt), "absent");
  EXPECT_EQ(stable(std::nullopt, {.tensor = Shape{2, 8}}), "absent");
  EXPECT_EQ(stable(kState, {.dep = std::nullopt}), "absent");
}

TEST(StableSharding, TensorsCorrectTheResult) {
  EXPECT_EQ(stable(kState, {.tensor = Shape{2, 6, 4, 64}}), "((fsdp,dp), -, tp, -)");
  EXPECT_EQ(stable(kState, {.tensor = Shape{2, 8, 3, 64}}), "((fsdp,dp), sp, -, -)");
  EXPECT_EQ(stable(kState, {.tensor = Shape{2, 7, 3, 5}}), "((fsdp,dp), -, -, -)");
}

TEST(StableSharding, PreservedIndices) {
  const PartitionSpec clone = PartitionSpec::parse("(dp, -, sp, -)");
  EXPECT_EQ(stable(kState, {.preserved_indices = {{0, 2}}}), "((fsdp,dp), -, tp, -)");
  EXPECT_EQ(stable(kState, {.preserved_indices = {{0, 2}}, .clone = clone}), "(dp, -, sp, -)");
  EXPECT_EQ(stable(kState, {.preserved_indices = std::vector<int>{}}), "(-, -, -, -)");
  EXPECT_EQ(stable(kState, {.preserved_indices = std::vector<int>{}, .tensor = Shape{2, 8, 4, 64}}),
            "()");
  EXPECT_EQ(stable(kState, {.preserved_indices = {{-1, 1}}}), "(-, sp, -, -)");
  EXPECT_EQ(stable(kState, {.preserved_indices = {{0, 1, 2}}, .tensor = Shape{2, 8, 4}}),
            "((fsdp,dp), sp, tp)");
}

TEST(StableSharding, IndexOutOfRangeOrCloneTooShort) {
  EXPECT_THROW(stable(kState, {.preserved_indices = {{0, 4}}}), Error);
  EXPECT_THROW(stable(kState, {.preserved_indices = {{-5, 0}}}), Error);
  EXPECT_THROW(
      stable(kState, {.preserved_indices = {{0, 2}}, .clone = PartitionSpec::parse("(dp, -)")}),
      Error);
}

TEST(StableSharding, TuplesAreKeptOrDroppedWhole) {
  const PartitionSpec both = PartitionSpec::parse("((tp,sp), -)");
  EXPECT_EQ(stable(both, {.tensor = Shape{4, 3}}), "()");
  EXPECT_EQ(stable(both, {.tensor = Shape{16, 3}}), "((tp,sp), -)");
  EXPECT_EQ(stable(PartitionSpec::parse("((dp,foo), sp)"), {.tensor = Shape{8, 8}}), "(-, sp)");
}

TEST(StableSharding, PreservedByOperation) {
  const auto kept = [](auto dims) {
    return stable(kState, {.preserved_indices = std::vector<int>(dims.begin(), dims.end())});
  };
  EXPECT_EQ(kPreservedByFlash, (std::array{0, 2}));
  EXPECT_EQ(kept(kPreservedByFlash), "((fsdp,dp), -, tp, -)");
  EXPECT_EQ(kPreservedByRing, (std::array{0, 1, 2}));
  EXPECT_EQ(kept(kPreservedByRing), "((fsdp,dp), sp, tp, -)");
  EXPECT_EQ(kPreservedByBlocksparse, (std::array{0, 1}));
}

}  // namespace
}  // namespace annulus
