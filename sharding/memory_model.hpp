#pragma once

#include <cstdint>

#include "sharding/attention_plan.hpp"
#include "sharding/cost_model.hpp"

namespace annulus {

/// Bytes that an execution holds besides the caller's tensors: what ExecutionReport::buffer_bytes
/// will be. `in_place` as in ExecuteOptions, with readable peers.
std::int64_t forward_buffer_bytes(const AttentionPlan& plan, const AttentionSizes& sizes,
                                  bool in_place);
std::int64_t backward_buffer_bytes(const AttentionPlan& plan, const AttentionSizes& sizes,
                                   bool in_place);
/// Bytes of a rank's own q, k, v, o and LSE, and of gradients where `backward`.
std::int64_t shard_bytes(const AttentionPlan& plan, const AttentionSizes& sizes, bool backward);

}  // namespace annulus
