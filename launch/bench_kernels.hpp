#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus bench kernels`: attention on one processor or device, beside its ceiling and its peer,
/// all measured in turn in the same run.
void bench_kernels(Arguments arguments);

}  // namespace annulus::launch
