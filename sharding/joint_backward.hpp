#pragma once

#include "sharding/execution_accounting.hpp"
#include "sharding/kv_feed.hpp"

namespace annulus {

/// Whether a rank's backward pass of a ring may be one call: one device has the memory of all ranks,
/// its kernel adds to rows to which others add meanwhile, and nothing asks for an order of sums.
bool may_join_backward(const Communicator& ranks, const AttentionPlan& plan,
                       const BackwardCall& local, const ExecuteOptions& options);

/// The backward pass of a ring in one call over all ranks' keys where they lie, which adds to all
/// ranks' gradients of them where they lie: nothing is returned, and passes over keys are long.
/// @pre feed.joined(), with Reading::together
void joint_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                    const ExecuteOptions& options, KvFeed& feed, ExecutionAccounting& accounting);

}  // namespace annulus
