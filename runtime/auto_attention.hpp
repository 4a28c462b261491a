#pragma once

#include "runtime/operation_registry.hpp"

namespace annulus {

/// `auto`: the scheme for which the cost model predicts the shortest time, see
/// sharding/simulate.hpp.
OperationEntry auto_attention();

}  // namespace annulus
