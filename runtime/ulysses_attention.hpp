#pragma once

#include "runtime/operation_registry.hpp"

namespace annulus {

/// `ulysses`: heads exchanged against rows (Jacobs et al., 2023), see sharding/ulysses.hpp.
OperationEntry ulysses_attention();

}  // namespace annulus
