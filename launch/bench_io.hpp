#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus bench io`: rates of reading and writing f32 tensors beside plain pread and pwrite of
/// the same bytes by the same ranks, and the peak memory of a rank beside its bound.
void bench_io(Arguments arguments);

}  // namespace annulus::launch
