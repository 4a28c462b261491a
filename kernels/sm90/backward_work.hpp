#pragma once

#include "kernels/sm90/forward_work.hpp"

namespace annulus::kernels::sm90 {

enum class BlockOrder : std::uint8_t {
  most_queries_first,  // so that the last to finish are short
  last_keys_first,     // under a causal mask the order in which blocks reach a query
};

/// The blocks of keys of a backward launch in the order given: entries whose q_begin counts keys,
/// and their slices, clipped to the run of keys between two slice bounds that the block lies in.
/// All keys of a block thus belong to the same slices, and each key to one block. Keys that no
/// slice covers have no block. Pure host arithmetic.
ForwardWork plan_backward(const SliceList& mask, std::int64_t batch, std::int32_t block_keys,
                          BlockOrder order);

}  // namespace annulus::kernels::sm90
