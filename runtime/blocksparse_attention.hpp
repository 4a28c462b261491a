#pragma once

#include "runtime/operation_registry.hpp"

namespace annulus {

/// `blocksparse`, alias `splash`: attention under a mask of kept blocks
/// (AttentionMask::kept_blocks) over the sequence axis; blocks that are not kept are neither
/// computed nor sent.
OperationEntry blocksparse_attention();

}  // namespace annulus
