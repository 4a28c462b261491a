#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus info`: the build, MPI, HDF5, kernels, devices and ranks per node.
void show_info(Arguments arguments);

}  // namespace annulus::launch
