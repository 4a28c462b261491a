#pragma once

#include "kernels/attention.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/cpu/scratch.hpp"

namespace annulus::kernels {

/// Most rows (queries × heads of a group) that decode_rows takes: with more, lanes as queries win.
inline constexpr std::int64_t kMostDecodeRows = 8;

std::int64_t decode_scratch(const AttentionProblem& problem);

/// Attention of all queries and heads of one batch row against a range of keys, for so few rows
/// that the memory holding K and V sets the time. Leaves a state that starts empty, without sinks.
/// @pre every KV head serves at most kMostDecodeRows rows; scratch has room for decode_scratch().
void decode_rows(const AttentionProblem& problem, std::int64_t batch, Span keys,
                 const AttentionState& partial, Scratch& scratch);

}  // namespace annulus::kernels
