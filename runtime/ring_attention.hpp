#pragma once

#include "runtime/operation_registry.hpp"

namespace annulus {

/// `ring`: ring attention over the sequence axis (Liu et al., 2023), see sharding/ring.hpp.
OperationEntry ring_attention();

}  // namespace annulus
