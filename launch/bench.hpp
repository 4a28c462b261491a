#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus bench WHAT`: each measures one part beside its ceiling in the same run.
void run_bench(Arguments arguments);

}  // namespace annulus::launch
