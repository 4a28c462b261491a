#pragma once

#include <cstdint>

#include "sharding/attention_plan.hpp"
#include "sharding/cost_model.hpp"

namespace annulus {

/// How a ring's rows are reached; as in Rates.
struct RowAccess {
  bool in_place = false;
  bool one_launch = false;
  bool one_device = false;
};
RowAccess row_access(const Rates& rates);

/// Bytes that an execution holds besides the caller's tensors: what ExecutionReport::buffer_bytes
/// will be.
std::int64_t forward_buffer_bytes(const AttentionPlan& plan, const AttentionSizes& sizes,
                                  const RowAccess& access);
std::int64_t backward_buffer_bytes(const AttentionPlan& plan, const AttentionSizes& sizes,
                                   const RowAccess& access);
/// Whether one call does a ring's pass where one device has all ranks' memory: forward over each
/// rank's rows where they lie, backward over all of them as one tensor.
bool is_one_call_on_one_device(const AttentionPlan& plan, const AttentionSizes& sizes,
                               bool backward);
/// Whether a rank that exchanges heads reads and writes its own rows where they lie (see OwnRows).
bool computes_own_rows_in_place(const AttentionPlan& plan, const RowAccess& access);
/// Bytes of a rank's own q, k, v, o and LSE, and of gradients where `backward`.
std::int64_t shard_bytes(const AttentionPlan& plan, const AttentionSizes& sizes, bool backward);

}  // namespace annulus
