#pragma once

#include <optional>
#include <string>

#include "launch/commands.hpp"
#include "launch/plan_options.hpp"

namespace annulus::launch {

/// What `annulus bench ring` measures.
struct RingOptions {
  PlanOptions plan;
  int repeats = 3;
  std::string rates_out;
  bool in_place = true;
  bool memory = false;
  std::string trace;
  int node_ranks = 0;
  std::string backend;  // empty: cuda where it can
  std::string transport = "auto";
  bool one_launch = true;
};

/// Absent after --help. Throws usage.
std::optional<RingOptions> parse_ring_options(Arguments arguments);

}  // namespace annulus::launch
