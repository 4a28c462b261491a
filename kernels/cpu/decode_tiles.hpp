#pragma once

#include "kernels/cpu/decode_pages.hpp"

namespace annulus::kernels {

/// Whether a block of so many queries has rows enough for a KV head to be multiplied as a matrix,
/// by the tile unit or by dot products of bf16.
bool decode_tiles_fit(const DecodeProblem& problem, std::int64_t queries);

std::int64_t decode_tiles_scratch(const DecodeProblem& problem, std::int64_t queries);

/// decode_pages() by such products, weights rounded to bf16. Returns false, with nothing of worth
/// in the state, where some value is not finite: 0 times it would not be 0.
/// @pre decode_tiles_fit(), scratch has room for decode_tiles_scratch()
bool decode_tiles(const DecodeProblem& problem, const DecodeBlock& block,
                  const AttentionState& partial, Scratch& scratch);

}  // namespace annulus::kernels
