#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "launch/program.hpp"

namespace annulus::testing {
namespace {

std::vector<std::string> tiny_bench() {
  return {"bench",      "kernels",  "--backend", "cpu",         "--seq",       "40",
          "--head-dim", "16",       "--heads",   "4",           "--group",     "2",
          "--dtype",    "f32,bf16", "--mask",    "full,causal", "--direction", "forward,backward",
          "--repeats",  "1"};
}

TEST(BenchKernels, HasARowForEveryCombination) {
  std::vector<std::string> arguments = tiny_bench();
  arguments.emplace_back("--json");
  const Outcome outcome = run_annulus(0, arguments);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const nlohmann::json rows = nlohmann::json::parse(outcome.out);
  std::vector<std::string> found;
  for (const nlohmann::json& row : rows) {
    found.push_back(row.at("direction").get<std::string>() + " " +
                    row.at("dtype").get<std::string>() + " " + row.at("mask").get<std::string>());
    EXPECT_EQ(row.at("name").get<std::string>().rfind("cpu ", 0), 0U);
    EXPECT_EQ(row.at("heads"), 4);
    EXPECT_EQ(row.at("kv_heads"), 2);
    EXPECT_EQ(row.at("seq_q"), 40);
    EXPECT_EQ(row.at("seq_kv"), 40);
    EXPECT_EQ(row.at("head_dim"), 16);
    EXPECT_EQ(row.at("unit"), "GFLOP/s");
    EXPECT_GT(row.at("seconds"), 0.0);
    EXPECT_GT(row.at("ceiling"), 0.0);
    // 4 operations of a pair and column, 2.5 times as many backward.
    const double pairs = row.at("mask") == "full" ? 40.0 * 40.0 : 40.0 * 41.0 / 2.0;
    const double flops = 4.0 * pairs * 4 * 16 * (row.at("direction") == "forward" ? 1.0 : 2.5);
    const double seconds = row.at("seconds");
    EXPECT_NEAR(row.at("rate").get<double>() * seconds * 1e9, flops, 1e-6 * flops);
    const double ceiling = row.at("ceiling");
    EXPECT_NEAR(row.at("of_ceiling").get<double>() * ceiling, row.at("rate").get<double>(), 1e-9);
  }
  EXPECT_EQ(found, (std::vector<std::string>{"forward f32 full", "forward f32 causal",
                                             "forward bf16 full", "forward bf16 causal",
                                             "backward f32 full", "backward f32 causal",
                                             "backward bf16 full", "backward bf16 causal"}));
}

TEST(BenchKernels, PrintsATableAndRefusesWhatItCannotMeasure) {
  const Outcome table = run_annulus(0, tiny_bench());
  ASSERT_EQ(table.exit_code, 0) << table.err;
  EXPECT_NE(table.out.find("ceiling (of it)"), std::string::npos);
  EXPECT_NE(table.out.find("1x40x4x16 on 40x2"), std::string::npos) << table.out;
  const Outcome refused =
      run_annulus(0, {"bench", "kernels", "--backend", "cpu", "--heads", "3", "--group", "2"});
  EXPECT_NE(refused.exit_code, 0);
  EXPECT_NE(refused.err.find("--heads 3 is no multiple of --group 2"), std::string::npos)
      << refused.err;
}

}  // namespace
}  // namespace annulus::testing
