#pragma once

#include "kernels/attention.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/cpu/scratch.hpp"

namespace annulus::kernels {

/// Where a block leaves its rows: the call's own outputs, or a state that starts empty, without
/// sinks, when only a part of the keys is computed and merged later.
struct ForwardBlock {
  RowBlock rows;
  const AttentionState* partial = nullptr;
};

/// Floats of scratch that forward_rows needs for a block.
std::int64_t forward_scratch(const AttentionProblem& problem, const RowBlock& block);

/// Attention of one block of rows on this thread, on the best target of this processor.
/// @pre scratch has room for forward_scratch().
void forward_rows(const ForwardCall& call, const ForwardBlock& block, Scratch& scratch);

}  // namespace annulus::kernels
