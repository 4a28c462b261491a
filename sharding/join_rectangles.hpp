#pragma once

#include "kernels/mask.hpp"

namespace annulus {

/// The same pairs in fewer slices: rectangles that no band cuts become one where they adjoin. A
/// kernel's passes over the keys of one rectangle are alike, and long.
MaskSlices join_rectangles(const MaskSlices& mask);

}  // namespace annulus
