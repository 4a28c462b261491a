#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "kernels/error.hpp"
#include "launch/plan_options.hpp"
#include "launch/plan_svg.hpp"
#include "launch/program.hpp"
#include "sharding/simulate.hpp"

namespace annulus::launch {
namespace {

std::string failure_of(const PlanOptions& options) {
  try {
    plan_attention(options);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Plan, ReadsMasksInWords) {
  const AttentionMask mask = parse_mask("causal+window:4,0+documents:0,6,10", 12, 12);
  EXPECT_TRUE(mask.causal);
  EXPECT_EQ(mask.window_left, 4);
  EXPECT_EQ(mask.window_right, 0);
  ASSERT_EQ(mask.q_segments.size(), 1U);
  EXPECT_EQ(mask.q_segments[0].size(), 3U);  // the last two rows are padding
  EXPECT_EQ(parse_mask("random-documents:5,3", 100, 100).q_segments[0].size(), 5U);
  EXPECT_EQ(parse_mask("prefix:7", 9, 9).prefix_lengths, std::vector<std::int64_t>{7});
}

TEST(Plan, RefusesInWordsWhatItCannotPlan) {
  PlanOptions options;
  options.mask = "diagonal";
  EXPECT_NE(failure_of(options).find("no mask \"diagonal\"; there are full, causal"),
            std::string::npos);
  options = {};
  options.operation = "star";
  EXPECT_NE(failure_of(options).find("there are ring, all_gather, ulysses, hybrid, auto"),
            std::string::npos);
  options = {};
  options.rates = "/nowhere.json";
  EXPECT_NE(failure_of(options).find("accepted: h100, cpu, or a file"), std::string::npos);
}

// Sizes whose products leave 63 bits would make a plan of wrong numbers.
TEST(Plan, RefusesSizesThatItCannotCount) {
  PlanOptions options;
  options.head_dim = std::int64_t{1} << 62;
  EXPECT_NE(failure_of(options).find("--head-dim 4611686018427387904"), std::string::npos);
  options = {};
  options.batch = std::int64_t{1} << 40;
  EXPECT_NE(failure_of(options).find("--batch 1099511627776"), std::string::npos);
  for (const char* mesh : {"sp=0", "sp=8,tp", "sp=65536,tp=65536", "sp=-1,tp=-1"}) {
    options = {};
    options.mesh = mesh;
    EXPECT_NE(failure_of(options).find(mesh), std::string::npos) << mesh;
  }
  for (const char* heads : {"0", "8:0", "8:3", "64:8:1", "eight", "8:99999999999999999999"}) {
    options = {};
    options.heads = heads;
    EXPECT_NE(failure_of(options).find(heads), std::string::npos) << heads;
  }
  for (const char* seq : {"-1", "1e6", "99999999999999999999"}) {
    try {
      parse_plan_options(std::vector<std::string>{"--seq", seq});
      ADD_FAILURE() << seq;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(seq), std::string::npos) << error.what();
    }
  }
}

TEST(Plan, DividesBatchAndHeadsOverTheMesh) {
  PlanOptions options;
  options.operation = "ring";
  options.mesh = "sp=4,tp=2,dp=3";
  options.batch = 6;
  const PlannedAttention planned = plan_attention(options);
  EXPECT_EQ(planned.request->q_layout.ranks(), 4);
  EXPECT_EQ(planned.request->q_heads, 32);
  EXPECT_EQ(planned.request->kv_heads, 4);
  EXPECT_EQ(planned.request->batch, 2);
  EXPECT_EQ(planned.groups, 6);
}

// Every opened element is closed: what a browser insists on.
void expect_well_formed(const std::string& text) {
  std::vector<std::string> open;
  for (std::size_t at = text.find('<'); at != std::string::npos; at = text.find('<', at + 1)) {
    const std::size_t end = text.find('>', at);
    ASSERT_NE(end, std::string::npos);
    const std::string tag = text.substr(at + 1, end - at - 1);
    if (tag.back() == '/') continue;
    if (tag.front() == '/') {
      ASSERT_FALSE(open.empty());
      EXPECT_EQ(open.back(), tag.substr(1));
      open.pop_back();
    } else {
      open.push_back(tag.substr(0, tag.find(' ')));
    }
  }
  EXPECT_TRUE(open.empty());
}

TEST(Plan, DrawsEveryKindOfMask) {
  for (const char* mask : {"full", "causal", "causal+window:100,0", "documents:0,120,1248,4232",
                           "causal+random-documents:9000", "causal+prefix:50"}) {
    for (const char* operation : {"ring", "all_gather", "ulysses", "hybrid"}) {
      PlanOptions options;
      options.operation = operation;
      options.seq_q = 16384;
      options.mask = mask;
      const PlannedAttention planned = plan_attention(options);
      const Simulation simulation =
          simulate(planned.request, planned.sizes, planned.rates, Pass::forward);
      const std::string svg = draw_plan("title", *planned.request, simulation);
      SCOPED_TRACE(mask);
      expect_well_formed(svg);
      EXPECT_EQ(svg.find("nan"), std::string::npos);
      EXPECT_EQ(svg.find("inf,"), std::string::npos);
    }
  }
}

TEST(Plan, ReadsTheRatesThatABenchmarkWrote) {
  const std::string path = ::testing::TempDir() + "/annulus_plan_rates.json";
  std::ofstream(path) << R"({"forward_flops": 3e11, "backward_flops": 2e11,
    "copy_bandwidth": 1e10, "node_bandwidth": 2e10, "network_bandwidth": 3e9,
    "latency_seconds": 1e-6, "call_seconds": 1e-5, "node_ranks": 4,
    "hides_node_transfers": false, "reads_in_place": true})";
  const Rates rates = parse_rates(path);
  EXPECT_EQ(rates.forward_flops, 3e11);
  EXPECT_EQ(rates.node_ranks, 4);
  EXPECT_TRUE(rates.reads_in_place);
  std::ofstream(path) << "{}";
  EXPECT_THROW(parse_rates(path), Error);
  std::remove(path.c_str());
}

TEST(CommandsOfOneRank, FailUnderALauncherAsWithout) {
  const testing::TemporaryFolder folder;
  const std::vector<std::vector<std::string>> cases = {
      {"plan", "--seq", "1024", "--rates", folder.file("none.json")},
      {"plan", "--seq", "1024", "--mask", "window:4"},
      {"plan", "--seq", "1024", "--svg", folder.file("none/plan.svg")},
      {"diverged", folder.file("none")},
  };
  for (const std::vector<std::string>& arguments : cases) {
    const testing::Outcome alone = testing::run_annulus(0, arguments);
    const testing::Outcome launched = testing::run_annulus(2, arguments);
    EXPECT_NE(alone.exit_code, 0) << alone.out;
    EXPECT_EQ(launched.exit_code, alone.exit_code) << launched.err;
    EXPECT_EQ(launched.messages(), alone.messages()) << launched.err;
    EXPECT_EQ(launched.messages().size(), 1U) << launched.err;
  }
}

}  // namespace
}  // namespace annulus::launch
