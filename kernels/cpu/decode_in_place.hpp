#pragma once

#include "kernels/attention.hpp"
#include "kernels/cpu/scratch.hpp"

namespace annulus::kernels {

/// Whether every query sees every key of a range and nothing is added to scores or dropped: then a
/// batch row is a sequence of one page, and decode_pages() serves it.
bool decodes_in_place(const AttentionProblem& problem, std::int64_t batch, Span keys);

std::int64_t decode_in_place_scratch(const AttentionProblem& problem);

/// As decode_rows().
/// @pre decodes_in_place(), scratch has room for decode_in_place_scratch()
void decode_in_place(const AttentionProblem& problem, std::int64_t batch, Span keys,
                     const AttentionState& partial, Scratch& scratch);

}  // namespace annulus::kernels
