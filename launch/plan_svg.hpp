#pragma once

#include <string>

#include "sharding/simulate.hpp"

namespace annulus::launch {

/// A picture of a forward plan: the mask with each part in the colour of the rank that computes it,
/// who works on whose keys when, and what moves between which ranks.
std::string draw_plan(const std::string& title, const PlanRequest& request,
                      const Simulation& simulation);

}  // namespace annulus::launch
