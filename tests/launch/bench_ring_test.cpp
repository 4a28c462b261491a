#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "launch/bench_ring_options.hpp"
#include "tests/launch/program.hpp"

namespace annulus {
namespace {

using namespace testing;

TEST(BenchRing, DealsRowsByTheMaskWhereTheSchemeIsChosen) {
  const auto layout_of = [](const std::vector<std::string>& arguments) {
    return launch::parse_ring_options(arguments)->plan.layout;
  };
  EXPECT_EQ(layout_of({}), "zigzag");
  EXPECT_EQ(layout_of({"--op", "auto"}), "balanced");
  EXPECT_EQ(layout_of({"--op", "auto", "--layout", "zigzag"}), "zigzag");
}

struct MemoryCase {
  std::string name;
  int ranks;
  std::vector<std::string> arguments;
};

class Memory : public ::testing::TestWithParam<MemoryCase> {};

// What a rank holds at most, by the kernel's count, beside what the plan says.
TEST_P(Memory, IsWithinATenthOfThePlan) {
  std::vector<std::string> arguments{"bench",   "ring",      "--memory",   "--seq", "4096",
                                     "--heads", "8:8",       "--head-dim", "128",   "--mask",
                                     "causal",  "--repeats", "3"};
  if (GetParam().arguments.back() == "8192") {
    arguments.erase(arguments.begin() + 3, arguments.begin() + 5);
  }
  arguments.insert(arguments.end(), GetParam().arguments.begin(), GetParam().arguments.end());
  const Outcome run = run_annulus(GetParam().ranks, arguments);
  ASSERT_EQ(run.exit_code, 0) << run.err;
  std::istringstream lines(run.out);
  int passes = 0;
  for (std::string line; std::getline(lines, line); ++passes) {
    const nlohmann::json memory = nlohmann::json::parse(line);
    EXPECT_GE(memory.at("least_of_planned"), 0.9) << line;
    EXPECT_LE(memory.at("most_of_planned"), 1.1) << line;
  }
  EXPECT_EQ(passes, 2) << run.out;
}

INSTANTIATE_TEST_SUITE_P(
    Schemes, Memory,
    ::testing::Values(MemoryCase{"ring_in_place", 2, {"--op", "ring"}},
                      MemoryCase{"ring_messages", 2, {"--op", "ring", "--messages"}},
                      MemoryCase{"ring_of_four", 4, {"--op", "ring", "--messages"}},
                      MemoryCase{"all_gather", 2, {"--op", "all_gather", "--seq", "8192"}},
                      MemoryCase{"ulysses", 2, {"--op", "ulysses"}},
                      MemoryCase{
                          "hybrid", 4, {"--op", "hybrid", "--node-ranks", "2", "--seq", "8192"}},
                      MemoryCase{"reproducible", 2, {"--op", "ring", "--reproducible"}}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace annulus
