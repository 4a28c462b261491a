#include "sharding/partition_manager.hpp"

#include <gtest/gtest.h>

#include "kernels/error.hpp"

namespace annulus {
namespace {

TEST(PartitionAxis, Defaults) {
  const PartitionAxis axis;
  EXPECT_EQ(axis.batch.train, (AxisTuple{"fsdp", "dp"}));
  for (const std::string_view name : {"query_length", "key_length", "sequence"}) {
    EXPECT_EQ(axis.find(name)->train, AxisTuple{"sp"}) << name;
  }
  for (const std::string_view name : {"head", "kv_head", "hidden", "mlp", "vocab"}) {
    EXPECT_EQ(axis.find(name)->train, AxisTuple{"tp"}) << name;
  }
  EXPECT_EQ(axis.expert.train, AxisTuple{"ep"});
  for (const std::string_view name : {"head_dim", "kv_head_dim", "bias_head", "bias_key_length"}) {
    EXPECT_TRUE(axis.find(name)->train.empty()) << name;
  }
  EXPECT_EQ(axis.find("nonesuch"), nullptr);
  EXPECT_EQ(PartitionAxis::names().size(), 15U);
}

TEST(PartitionAxis, DecodeValueReplacesInDecodeAndInsert) {
  PartitionAxis axis;
  axis.key_length.decode = AxisTuple{"tp"};
  axis.query_length.decode = AxisTuple{};
  const PartitionManager manager(axis);
  const auto spec = [&](Mode mode) {
    return manager.resolve({"batch", "query_length", "key_length"}, mode).to_string();
  };
  EXPECT_EQ(manager.resolve({"key_length"}, Mode::train).to_string(), "(sp)");
  EXPECT_EQ(manager.resolve({"key_length"}, Mode::prefill).to_string(), "(sp)");
  EXPECT_EQ(spec(Mode::decode), "((fsdp,dp), -, tp)");
  EXPECT_EQ(spec(Mode::insert), "((fsdp,dp), -, tp)");
}

TEST(PartitionManager, UnknownSemanticAxisListsTheNames) {
  PartitionManager manager;
  manager.register_axis("pages", {{"dp"}});
  try {
    manager.resolve({"batch", "page"}, Mode::train);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    EXPECT_EQ(std::string(error.what()),
              "partition: unknown semantic axis 'page'; known are batch, sequence, query_length, "
              "key_length, head, kv_head, hidden, mlp, vocab, expert, expert_gate, head_dim, "
              "kv_head_dim, bias_head, bias_key_length, pages");
  }
}

TEST(PartitionManager, RegisteredAxesResolveLikeOthers) {
  PartitionManager manager;
  manager.register_axis("pages", {{"dp", "sp"}, AxisTuple{"sp"}});
  EXPECT_EQ(manager.resolve({"pages", "_", "head"}, Mode::train).to_string(), "((dp,sp), -, tp)");
  EXPECT_EQ(manager.resolve({"pages", "_", "head"}, Mode::decode).to_string(), "(sp, -, tp)");
  EXPECT_THROW(manager.register_axis("pages", {{"dp"}}), Error);
  EXPECT_THROW(manager.register_axis("head", {{"dp"}}), Error);
  EXPECT_THROW(manager.register_axis("_", {{"dp"}}), Error);
  EXPECT_THROW(manager.register_axis("two words", {{"dp"}}), Error);
}

TEST(GetMode, OneTokenDecodes) {
  EXPECT_EQ(get_mode({2, 1, 8, 64}, DimOrder::bthd), Mode::decode);
  EXPECT_EQ(get_mode({2, 8, 1, 64}, DimOrder::bhtd), Mode::decode);
  EXPECT_EQ(get_mode({1, 8, 64}, DimOrder::thd), Mode::decode);
  EXPECT_EQ(get_mode({2, 16, 8, 64}, DimOrder::bthd), Mode::train);
  EXPECT_EQ(get_mode({2, 0, 8, 64}, DimOrder::bthd), Mode::train);
  EXPECT_FALSE(causal_in(Mode::decode, true));
  EXPECT_TRUE(causal_in(Mode::train, true));
  EXPECT_FALSE(causal_in(Mode::train, false));
}

TEST(GetMode, OneHeadIsNotOneToken) {
  EXPECT_EQ(get_mode({2, 16, 1, 64}, DimOrder::bthd), Mode::train);
  EXPECT_EQ(get_mode({2, 1, 16, 64}, DimOrder::bhtd), Mode::train);
  EXPECT_EQ(get_mode({16, 1, 64}, DimOrder::thd), Mode::train);
  EXPECT_TRUE(causal_in(get_mode({2, 16, 1, 64}, DimOrder::bthd), true));
}

TEST(GetMode, RefusesAnotherRank) {
  EXPECT_THROW(get_mode({2, 16, 64}, DimOrder::bthd), Error);
  EXPECT_THROW(get_mode({2, 16, 1, 64}, DimOrder::thd), Error);
}

TEST(GetShardings, Bthd) {
  const AttentionShardings specs = PartitionManager().get_shardings(Mode::train, DimOrder::bthd);
  for (const PartitionSpec& spec : {specs.query, specs.key, specs.value, specs.output}) {
    EXPECT_EQ(spec.to_string(), "((fsdp,dp), sp, tp, -)");
  }
  EXPECT_EQ(specs.bias.to_string(), "((fsdp,dp), -, sp, -)");
  EXPECT_EQ(specs.mask.to_string(), "((fsdp,dp), -, sp, -)");
  EXPECT_EQ(specs.query3d.to_string(), "((fsdp,dp), tp, -)");
  EXPECT_EQ(specs.segment_ids.to_string(), "((fsdp,dp), sp)");
  EXPECT_EQ(specs.kv_segment_ids.to_string(), "((fsdp,dp), sp)");
  EXPECT_EQ(specs.sinks(2).to_string(), "(-, tp)");
  EXPECT_EQ(specs.sinks(1).to_string(), "(tp)");
}

TEST(GetShardings, BhtdSwapsTokensAndHeads) {
  const AttentionShardings specs = PartitionManager().get_shardings(Mode::train, DimOrder::bhtd);
  for (const PartitionSpec& spec : {specs.query, specs.key, specs.value, specs.output}) {
    EXPECT_EQ(spec.to_string(), "((fsdp,dp), tp, sp, -)");
  }
  EXPECT_EQ(specs.bias.to_string(), "((fsdp,dp), -, sp, -)");
}

TEST(GetShardings, ThdLiesAlongTheSequenceAxis) {
  const AttentionShardings specs = PartitionManager().get_shardings(Mode::train, DimOrder::thd);
  for (const PartitionSpec& spec : {specs.query, specs.key, specs.value, specs.output}) {
    EXPECT_EQ(spec.to_string(), "(sp, tp, -)");
  }
  EXPECT_EQ(specs.bias.to_string(), "(-, sp, -)");
  EXPECT_EQ(specs.segment_ids.to_string(), "(sp)");
  EXPECT_EQ(specs.query3d.to_string(), "((fsdp,dp), tp, -)");
}

TEST(GetShardings, DecodeRulesReachEverySpec) {
  PartitionAxis axis;
  axis.query_length.decode = AxisTuple{};
  axis.batch.decode = AxisTuple{"dp"};
  const PartitionManager manager(axis);
  const AttentionShardings specs = manager.get_shardings(Mode::decode, DimOrder::bthd);
  EXPECT_EQ(specs.query.to_string(), "(dp, -, tp, -)");
  EXPECT_EQ(specs.key.to_string(), "(dp, sp, tp, -)");
  EXPECT_EQ(specs.bias.to_string(), "(dp, -, -, -)");
  EXPECT_EQ(manager.get_shardings(Mode::train, DimOrder::bthd).query.to_string(),
            "((fsdp,dp), sp, tp, -)");
}

}  // namespace
}  // namespace annulus
