#include "runtime/divergence.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <sstream>

#include "kernels/error.hpp"

namespace annulus {
namespace {

constexpr std::string_view kHeader = "annulus-steps 1";
constexpr std::int64_t kPauseNs = 1'000'000'000;

StepRecord::State state_of(const std::string& word) {
  for (const auto state : {StepRecord::State::open, StepRecord::State::waiting,
                           StepRecord::State::done, StepRecord::State::failed}) {
    if (word == name(state)) return state;
  }
  throw Error(ExitCode::bad_data, "no state");
}

/// Names may have spaces; "group" comes after them.
bool parse_step(const std::string& line, RankDump::Step& step) {
  std::istringstream words(line);
  StepRecord& record = step.record;
  std::string word;
  if (!(words >> record.number)) return false;
  while (words >> word && word != "group") step.name += (step.name.empty() ? "" : " ") + word;
  std::string state;
  std::string label;
  words >> std::hex >> record.group >> std::dec >> record.group_number >> label >> record.peers;
  for (int& peer : record.peer) words >> peer;
  words >> label >> record.bytes >> label >> record.outstanding >> label >> record.begun_ns >>
      label >> record.moved_ns >> label >> record.ended_ns >> state;
  if (!words) return false;
  record.state = state_of(state);
  return true;
}

void parse_head(std::istream& file, RankDump& dump) {
  std::string label;
  int process = 0;
  file >> label >> dump.rank >> label >> dump.size >> label >> process >> label >> dump.host;
  file >> label >> std::ws;
  std::getline(file, dump.reason);
  file >> label >> std::ws;
  std::getline(file, dump.phase);
  file >> label >> dump.paused_ns >> label >> dump.suspect >> label >> dump.now_ns >> std::ws;
}

std::string list(const std::vector<int>& ranks) {
  return fmt::format("{} {}", ranks.size() == 1 ? "rank" : "ranks", fmt::join(ranks, ", "));
}

bool is_with(const StepRecord& step, int rank) {
  return std::find(step.peer.begin(), step.peer.end(), rank) != step.peer.end();
}

/// Ranks whose waiting step needs `rank`: they name it, or their group has got further.
std::vector<int> waiting_for(std::span<const RankDump> dumps, int rank) {
  std::vector<int> result;
  std::map<std::uint64_t, std::int64_t> reached;
  for (const RankDump& dump : dumps) {
    if (dump.rank != rank) continue;
    for (const auto& step : dump.steps) {
      auto& number = reached[step.record.group];
      number = std::max(number, step.record.group_number);
    }
  }
  for (const RankDump& dump : dumps) {
    const RankDump::Step* step = dump.waiting();
    if (step == nullptr || dump.rank == rank) continue;
    const bool collective = step->record.group_number > 0;
    const auto known = reached.find(step->record.group);
    const bool behind = known != reached.end() && known->second < step->record.group_number;
    if (collective ? behind : is_with(step->record, rank)) result.push_back(dump.rank);
  }
  return result;
}

// ---- the rules -----------------------------------------------------------------------------

std::optional<Divergence> paused(std::span<const RankDump> dumps) {
  const auto longest = std::max_element(
      dumps.begin(), dumps.end(),
      [](const RankDump& a, const RankDump& b) { return a.paused_ns < b.paused_ns; });
  if (longest->paused_ns < kPauseNs) return std::nullopt;
  return Divergence{longest->rank,
                    fmt::format("its process did not run for {:.1f} s, in phase {}: "
                                "stopped, or without a processor",
                                static_cast<double>(longest->paused_ns) * 1e-9, longest->phase)};
}

/// The one of `ranks` that most others blame; absent when none does.
std::optional<int> most_blamed(std::span<const RankDump> dumps, const std::set<int>& ranks) {
  std::map<int, int> blamed;
  for (const RankDump& dump : dumps) {
    if (ranks.contains(dump.suspect)) ++blamed[dump.suspect];
  }
  const auto most =
      std::max_element(blamed.begin(), blamed.end(),
                       [](const auto& a, const auto& b) { return a.second < b.second; });
  return most == blamed.end() ? std::nullopt : std::optional(most->first);
}

std::optional<Divergence> without_dump(std::span<const RankDump> dumps) {
  std::set<int> missing;
  for (int rank = 0; rank < dumps.front().size; ++rank) missing.insert(rank);
  for (const RankDump& dump : dumps) missing.erase(dump.rank);
  if (missing.empty()) return std::nullopt;
  if (const auto rank = most_blamed(dumps, missing)) {
    return Divergence{*rank, "left no dump and did not answer the others"};
  }
  for (const RankDump& dump : dumps) {
    const RankDump::Step* step = dump.waiting();
    if (step == nullptr) continue;
    for (const int rank : missing) {
      if (!is_with(step->record, rank)) continue;
      return Divergence{rank,
                        fmt::format("left no dump: it was stopped, killed or cut off; rank {} "
                                    "waits for it in step {}: {}",
                                    dump.rank, step->record.number, step->name)};
    }
  }
  const std::vector<int> all(missing.begin(), missing.end());
  return Divergence{all.front(),
                    fmt::format("left no dump: stopped, killed or cut off ({})", list(all))};
}

/// What must be alike on all ranks of a collective step. Windows may differ in size.
std::string kind_of(const RankDump::Step& step) {
  const bool sized = step.name == "all_gather" || step.name == "all_reduce_sum";
  return sized ? fmt::format("{} of {} bytes", step.name, step.record.bytes) : step.name;
}

struct Seen {
  const RankDump* dump = nullptr;
  const RankDump::Step* step = nullptr;
};

std::optional<Divergence> odd_one(const std::vector<Seen>& seen) {
  std::map<std::string, std::vector<Seen>> kinds;
  for (const Seen& one : seen) kinds[kind_of(*one.step)].push_back(one);
  if (kinds.size() < 2) return std::nullopt;
  const auto by_size = [](const auto& a, const auto& b) {
    return a.second.size() < b.second.size();
  };
  const auto fewest = std::min_element(kinds.begin(), kinds.end(), by_size);
  const auto most = std::max_element(kinds.begin(), kinds.end(), by_size);
  const Seen& odd = fewest->second.front();
  std::vector<int> others;
  for (const Seen& one : most->second) {
    if (most != fewest) others.push_back(one.dump->rank);
  }
  return Divergence{odd.dump->rank,
                    fmt::format("its step {} is {} where {} did {}, number {} of their group",
                                odd.step->record.number, fewest->first, list(others), most->first,
                                odd.step->record.group_number)};
}

std::optional<Divergence> other_kind(std::span<const RankDump> dumps) {
  std::map<std::pair<std::uint64_t, std::int64_t>, std::vector<Seen>> steps;
  for (const RankDump& dump : dumps) {
    for (const auto& step : dump.steps) {
      const StepRecord& record = step.record;
      if (record.group_number > 0) {
        steps[{record.group, record.group_number}].push_back({&dump, &step});
      }
    }
  }
  std::optional<Divergence> first;
  std::int64_t first_number = 0;
  for (const auto& [place, seen] : steps) {
    const auto found = odd_one(seen);
    const std::int64_t number = seen.front().step->record.number;
    if (!found || (first && number >= first_number)) continue;
    first = found;
    first_number = number;
  }
  return first;
}

std::optional<Divergence> working_alone(std::span<const RankDump> dumps) {
  for (const RankDump& dump : dumps) {
    if (dump.waiting() != nullptr) continue;
    const std::vector<int> waiters = waiting_for(dumps, dump.rank);
    const std::string after =
        dump.steps.empty() ? "before its first step"
                           : fmt::format("after step {}: {}", dump.steps.back().record.number,
                                         dump.steps.back().name);
    return Divergence{
        dump.rank,
        fmt::format("waits for nobody, in phase {}, {}{}", dump.phase, after,
                    waiters.empty() ? std::string() : "; waited for by " + list(waiters))};
  }
  return std::nullopt;
}

std::optional<Divergence> waiting_elsewhere(std::span<const RankDump> dumps) {
  for (const RankDump& dump : dumps) {
    const RankDump::Step* step = dump.waiting();
    const std::vector<int> waiters = waiting_for(dumps, dump.rank);
    const bool mutual = std::any_of(waiters.begin(), waiters.end(), [&](int waiter) {
      return step->record.group_number == 0 && is_with(step->record, waiter);
    });
    if (waiters.empty() || mutual) continue;
    return Divergence{dump.rank,
                      fmt::format("waits in step {}: {}, phase {}, while {} for it",
                                  step->record.number, step->name, dump.phase,
                                  list(waiters) + (waiters.size() == 1 ? " waits" : " wait"))};
  }
  return std::nullopt;
}

}  // namespace

const RankDump::Step* RankDump::waiting() const {
  const auto found = std::find_if(steps.begin(), steps.end(), [](const Step& step) {
    return step.record.state == StepRecord::State::waiting;
  });
  return found == steps.end() ? nullptr : &*found;
}

RankDump read_dump(const std::string& path) {
  std::ifstream file(path);
  require(file.good(), ExitCode::missing_input, "{}: cannot be read", path);
  std::string line;
  std::getline(file, line);
  require(line == kHeader, ExitCode::bad_data, "{}: line 1 is not \"{}\"", path, kHeader);
  RankDump dump;
  parse_head(file, dump);
  require(file.good() || file.eof(), ExitCode::bad_data, "{}: no rank, reason and phase", path);
  require(dump.rank >= 0 && dump.rank < dump.size && dump.size <= 1 << 20, ExitCode::bad_data,
          "{}: rank {} of {}", path, dump.rank, dump.size);
  for (int number = 6; std::getline(file, line); ++number) {
    RankDump::Step step;
    require(parse_step(line, step), ExitCode::bad_data, "{}: line {} is no step", path, number);
    dump.steps.push_back(std::move(step));
  }
  return dump;
}

std::vector<RankDump> read_dumps(const std::string& folder) {
  std::error_code error;
  std::vector<RankDump> dumps;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.path().filename().string().starts_with("rank-")) {
      dumps.push_back(read_dump(entry.path().string()));
    }
  }
  require(!error && !dumps.empty(), ExitCode::missing_input, "{}: no dump of a rank in it", folder);
  std::sort(dumps.begin(), dumps.end(),
            [](const RankDump& a, const RankDump& b) { return a.rank < b.rank; });
  for (const RankDump& dump : dumps) {
    require(dump.size == dumps.front().size, ExitCode::bad_data,
            "{}: dumps of different jobs, rank {} of {} and rank {} of {}", folder,
            dumps.front().rank, dumps.front().size, dump.rank, dump.size);
  }
  return dumps;
}

Divergence first_divergence(std::span<const RankDump> dumps) {
  if (dumps.empty()) return {};
  for (const auto& rule : {paused, without_dump, other_kind, working_alone, waiting_elsewhere}) {
    if (const auto found = rule(dumps)) return *found;
  }
  return {-1, "all ranks wait for each other in the same steps: the transport between them stands"};
}

}  // namespace annulus
