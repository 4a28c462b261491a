#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus run`: attention from an HDF5 file to an HDF5 file.
void run_attention(Arguments arguments);

}  // namespace annulus::launch
