#pragma once

#include "kernels/mask.hpp"
#include "launch/options.hpp"
#include "runtime/checkpoint.hpp"
#include "sharding/communicator.hpp"

namespace annulus::launch {

/// The mask that the options and the file's documents or offsets describe, in global positions.
/// Throws bad_data when the offsets or ids do not fit the sequences, usage for both at once.
/// Collective.
AttentionMask read_mask(Communicator& communicator, const Checkpoint& checkpoint,
                        const RunOptions& options, bool causal);

/// A mask in words: "causal, window 128,0, documents".
std::string describe_mask(const RunOptions& options, bool causal);

}  // namespace annulus::launch
