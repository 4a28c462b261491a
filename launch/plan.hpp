#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus plan`: prints and draws a plan and what it would cost; needs no ranks and no data.
void show_plan(Arguments arguments);

}  // namespace annulus::launch
