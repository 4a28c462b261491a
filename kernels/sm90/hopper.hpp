#pragma once

#include <string>

namespace annulus::kernels::sm90 {

/// Why the current device cannot run these kernels; empty on a Hopper GPU.
std::string other_device();

}  // namespace annulus::kernels::sm90
