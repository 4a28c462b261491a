#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus bench ring`: an attention over the ranks that were started, beside what their kernels
/// reach alone and beside what its plan predicts. Measures the rates that `annulus plan --rates`
/// takes.
void bench_ring(Arguments arguments);

}  // namespace annulus::launch
