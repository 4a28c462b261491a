#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/launch/program.hpp"

namespace annulus {
namespace {

using namespace testing;

// The events of a trace by process and row, in order of time.
std::map<std::pair<int, int>, std::vector<nlohmann::json>> rows_of(const nlohmann::json& trace) {
  std::map<std::pair<int, int>, std::vector<nlohmann::json>> rows;
  for (const nlohmann::json& event : trace.at("traceEvents")) {
    if (event.at("ph") == "X") rows[{event.at("pid"), event.at("tid")}].push_back(event);
  }
  for (auto& [row, events] : rows) {
    std::stable_sort(events.begin(), events.end(),
                     [](const auto& a, const auto& b) { return a["ts"] < b["ts"]; });
  }
  return rows;
}

nlohmann::json trace_of_run(int ranks, std::vector<std::string> arguments, double* seconds) {
  const TemporaryFolder folder;
  const std::string file = folder.file("trace.json");
  std::vector<std::string> all{
      "run",    "--input", std::string(ANNULUS_TEST_DATA) + "/smollm_sample.h5",
      "--json", "--trace", file};
  all.insert(all.end(), arguments.begin(), arguments.end());
  const Outcome run = run_annulus(ranks, all);
  EXPECT_EQ(run.exit_code, 0) << run.err;
  *seconds = nlohmann::json::parse(run.out).at("seconds");
  return nlohmann::json::parse(content_of(file));
}

TEST(Trace, HasAProcessForEachRankAndRowsThatDoNotOverlap) {
  double seconds = 0.0;
  const nlohmann::json trace = trace_of_run(3, {"--op", "ring", "--layout", "zigzag"}, &seconds);
  std::set<int> named;
  for (const nlohmann::json& event : trace.at("traceEvents")) {
    if (event.at("name") == "process_name") named.insert(event.at("pid").get<int>());
  }
  EXPECT_EQ(named, (std::set<int>{0, 1, 2}));
  double first = 1e30;
  double last = 0.0;
  std::set<int> computed;
  for (const auto& [row, events] : rows_of(trace)) {
    double end = 0.0;
    for (const nlohmann::json& event : events) {
      const double begin = event.at("ts");
      const double duration = event.at("dur");
      EXPECT_GE(begin, 0.0);
      EXPECT_GE(duration, 0.0);
      if (row.second <= 1) {
        EXPECT_GE(begin, end - 0.01) << event.dump();
      }
      end = std::max(end, begin + duration);
      first = std::min(first, begin);
      if (event.at("cat") == "compute") computed.insert(row.first);
    }
    last = std::max(last, end);
  }
  EXPECT_EQ(computed, named);
  EXPECT_EQ(first, 0.0);
  // One clock for all ranks: nothing ends later than the run, give or take the clocks' error.
  EXPECT_LE(last, seconds * 1e6 + 2000.0);
}

TEST(Trace, ShowsExchangesOfHeads) {
  double seconds = 0.0;
  const nlohmann::json trace = trace_of_run(3, {"--op", "ulysses"}, &seconds);
  std::map<int, int> exchanges;
  for (const auto& [row, events] : rows_of(trace)) {
    for (const nlohmann::json& event : events) {
      if (event.at("cat") == "exchange") ++exchanges[row.first];
    }
  }
  EXPECT_EQ(exchanges.size(), 3U);
}

TEST(Trace, ThatCannotBeWrittenIsAnError) {
  const Outcome run =
      run_annulus(2, {"run", "--input", std::string(ANNULUS_TEST_DATA) + "/smollm_sample.h5",
                      "--op", "ring", "--trace", "/nowhere/trace.json"});
  EXPECT_EQ(run.exit_code, 73) << run.err;
  EXPECT_NE(run.err.find("/nowhere/trace.json"), std::string::npos) << run.err;
}

}  // namespace
}  // namespace annulus
