#include "sharding/partition_spec.hpp"

#include <gtest/gtest.h>

#include "kernels/error.hpp"

namespace annulus {
namespace {

std::string message_of(std::string_view text) {
  try {
    PartitionSpec::parse(text);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    return error.what();
  }
  return "accepted";
}

TEST(PartitionSpec, ParsesAndPrints) {
  const PartitionSpec spec = PartitionSpec::parse("((fsdp,dp), sp, tp, -)");
  EXPECT_EQ(spec, PartitionSpec({{"fsdp", "dp"}, {"sp"}, {"tp"}, {}}));
  EXPECT_EQ(spec.size(), 4);
  EXPECT_EQ(spec[0], (AxisTuple{"fsdp", "dp"}));
  EXPECT_TRUE(spec[3].empty());
  EXPECT_TRUE(spec[7].empty());
  EXPECT_EQ(spec.to_string(), "((fsdp,dp), sp, tp, -)");
}

TEST(PartitionSpec, SpellingsOfTheSameSpec) {
  EXPECT_EQ(PartitionSpec::parse(" ( ( sp ) , none ,-, )"), PartitionSpec({{"sp"}, {}, {}}));
  EXPECT_EQ(PartitionSpec::parse("(nonesuch)"), PartitionSpec({{"nonesuch"}}));
  EXPECT_TRUE(PartitionSpec::parse("()").empty());
  EXPECT_EQ(PartitionSpec().to_string(), "()");
  EXPECT_NE(PartitionSpec(), PartitionSpec({AxisTuple{}}));
}

TEST(PartitionSpec, PrintedTextReadsBack) {
  for (const std::string_view text : {"()", "(-)", "(-, -)", "(sp)", "((a,b,c), -, d_1)"}) {
    EXPECT_EQ(PartitionSpec::parse(text).to_string(), text);
  }
}

TEST(PartitionSpec, RefusesWithThePlace) {
  EXPECT_EQ(message_of("sp, tp"),
            "partition spec: expected '(' at character 1 of 'sp, tp'; write it as ((fsdp,dp), sp, "
            "tp, -)");
  for (const std::string_view text :
       {"", "(", "(sp", "(sp))", "(,)", "((sp)", "(())", "(sp tp)", "(9)", "((none,sp))", "(sp) x",
        "((a,-))", "((a,),b)", "(a--)", "(\xe2\x80\x93)"}) {
    EXPECT_NE(message_of(text), "accepted") << text;
  }
}

TEST(PartitionSpec, AnAxisSplitsOneDimension) {
  EXPECT_EQ(message_of("(sp, (dp,sp))"),
            "partition spec: axis sp stands twice in (sp, (dp,sp)); an axis splits one dimension");
  EXPECT_THROW(PartitionSpec({{"a b"}}), Error);
  EXPECT_THROW(PartitionSpec({{"none"}}), Error);
}

}  // namespace
}  // namespace annulus
