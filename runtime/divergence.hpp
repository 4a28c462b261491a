#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "runtime/operation_log.hpp"

namespace annulus {

/// What one rank's dump_steps() left.
struct RankDump {
  struct Step {
    std::string name;
    StepRecord record;  // its name is empty here
  };

  int rank = 0;
  int size = 1;
  std::string host;
  std::string reason;
  std::string phase;
  std::int64_t paused_ns = 0;  // OperationLog::paused_ns()
  int suspect = -1;            // whom its watchdog blamed
  std::int64_t now_ns = 0;
  std::vector<Step> steps;  // oldest first

  /// The step that the rank waited for; null: none.
  const Step* waiting() const;
};

/// Reads one file. Throws bad_data with file and line, missing_input.
RankDump read_dump(const std::string& path);

/// Reads every rank-* of a folder, in the order of the ranks. Throws missing_input when there is
/// none, bad_data when they are of different jobs.
std::vector<RankDump> read_dumps(const std::string& folder);

/// The first rank that left the common course, and how that shows.
struct Divergence {
  int rank = -1;  // -1: none can be named
  std::string reason;
};

/// Looks, in this order, for a process that did not run for over a second, as when it was stopped;
/// for a rank without a dump that others blame; for the others without one; for a collective step
/// of which one rank's kind or size is not that of the others; for a rank that waits for nobody;
/// for a rank that waits for ranks which do not wait for it.
Divergence first_divergence(std::span<const RankDump> dumps);

}  // namespace annulus
