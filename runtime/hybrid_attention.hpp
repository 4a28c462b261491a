#pragma once

#include "runtime/operation_registry.hpp"

namespace annulus {

/// `hybrid`: heads exchanged inside a node, keys travelling between nodes (USP; Fang and Zhao,
/// 2024), see sharding/hybrid.hpp. Nodes are those of the context.
OperationEntry hybrid_attention();

}  // namespace annulus
