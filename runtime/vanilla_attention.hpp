#pragma once

#include "runtime/operation_registry.hpp"

namespace annulus {

/// `vanilla`: dense attention, each rank for its own query rows against all keys; the only
/// operation that returns attention_weights.
OperationEntry vanilla_attention();

}  // namespace annulus
