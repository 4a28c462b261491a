#include "launch/diverged.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "launch/failure.hpp"
#include "launch/number_option.hpp"
#include "launch/parse.hpp"
#include "runtime/divergence.hpp"
#include "runtime/flight_recorder.hpp"

namespace annulus::launch {
namespace {

void print_step(const RankDump& dump, const RankDump::Step& step) {
  StepRecord record = step.record;
  record.name = step.name;
  SignalText text;
  append_step(text, record);
  const std::int64_t end = record.ended_ns != 0 ? record.ended_ns : dump.now_ns;
  fmt::print("    {:<8} {:>9.3f} s  {}\n", name(record.state),
             static_cast<double>(end - record.begun_ns) * 1e-9, text.view());
}

void print_rank(const RankDump& dump, std::size_t steps) {
  fmt::print("rank {} ({}), phase {}, dumped on {}, {} steps kept\n", dump.rank, dump.host,
             dump.phase, dump.reason, dump.steps.size());
  const std::size_t first = dump.steps.size() - std::min(steps, dump.steps.size());
  for (std::size_t i = first; i < dump.steps.size(); ++i) print_step(dump, dump.steps[i]);
}

}  // namespace

void name_diverged(Arguments arguments) {
  CLI::App app("Names the first rank that left the common course of a job that hung.",
               "annulus diverged");
  std::string folder;
  std::size_t steps = 3;
  bool json = false;
  app.add_option("FOLDER", folder, "where the ranks left their last steps")->required();
  app.add_option("--steps", steps, "how many of each rank are shown, default 3")
      ->check(whole_number<>(0));
  app.add_flag("--json", json, "for machines");
  if (!parse(app, arguments) || !is_speaking_rank()) return;
  leave_peers();
  const std::vector<RankDump> dumps = read_dumps(folder);
  const Divergence found = first_divergence(dumps);
  if (json) {
    fmt::print("{}\n", nlohmann::json{{"rank", found.rank}, {"reason", found.reason}}.dump());
    return;
  }
  for (const RankDump& dump : dumps) print_rank(dump, steps);
  const std::string who = found.rank < 0 ? "no rank alone" : fmt::format("rank {}", found.rank);
  fmt::print("first diverged: {}: {}\n", who, found.reason);
}

}  // namespace annulus::launch
