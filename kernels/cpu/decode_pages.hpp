#pragma once

#include <cstdint>
#include <span>

#include "kernels/cpu/scratch.hpp"
#include "kernels/decode_attention.hpp"

namespace annulus::kernels {

/// What one task computes: some query rows of a sequence, all heads, against some of this rank's
/// tokens of it.
struct DecodeBlock {
  std::int64_t sequence = 0;
  Span queries;           // rows of q
  Span tokens;            // that some row sees, and all between them
  std::int64_t part = 0;  // tokens of a state: the first so many have one, the next, and the rest
};

/// This rank's tokens that a query row may see: visible positions are a span, and so are they.
Span visible_tokens(const DecodeProblem& problem, std::int64_t sequence, std::int64_t query);

/// Floats of scratch memory that a block of so many queries needs.
std::int64_t decode_pages_scratch(const DecodeProblem& problem, std::int64_t queries);

/// Attention of a block, keys and values read once where they lie, without a stop between the
/// parts. Leaves for each part a state of the block's rows, [1, queries, q_heads, value_dim], that
/// starts empty, without sinks: the same bits as from a call for that part alone.
/// @pre there are tokens, a part that others follow is a multiple of 64 of them, scratch has room
/// for decode_pages_scratch()
void decode_pages(const DecodeProblem& problem, const DecodeBlock& block,
                  std::span<const AttentionState> partials, Scratch& scratch);

}  // namespace annulus::kernels
