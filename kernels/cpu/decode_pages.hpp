#pragma once

#include <cstdint>

#include "kernels/cpu/scratch.hpp"
#include "kernels/decode_attention.hpp"

namespace annulus::kernels {

/// What one task computes: some query rows of a sequence, all heads, against some of this rank's
/// tokens of it.
struct DecodeBlock {
  std::int64_t sequence = 0;
  Span queries;  // rows of q
  Span tokens;
};

/// This rank's tokens that a query row may see: visible positions are a span, and so are they.
Span visible_tokens(const DecodeProblem& problem, std::int64_t sequence, std::int64_t query);

/// Floats of scratch memory that a block of so many queries needs.
std::int64_t decode_pages_scratch(const DecodeProblem& problem, std::int64_t queries);

/// Attention of a block, keys and values read once where they lie. Leaves a state of the block's
/// rows, [1, queries, q_heads, value_dim], that starts empty, without sinks.
/// @pre scratch has room for decode_pages_scratch()
void decode_pages(const DecodeProblem& problem, const DecodeBlock& block,
                  const AttentionState& partial, Scratch& scratch);

}  // namespace annulus::kernels
