#pragma once

#include "sharding/execution.hpp"

namespace annulus {

/// Ring attention (Liu et al., 2023) over a plan: q stays, each stage's KV rows arrive while the
/// stage before computes, partial results stay in fp32 on the rank that owns the query rows. Holds
/// at most two stages' remote rows. See execute_forward for the arguments.
void ring_forward(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                  const ExecuteOptions& options = {});

/// KV travels as in the forward pass; fp32 partials of dK and dV return to their owners one stage
/// behind and are added in the order of the stages, so that runs agree to the bit.
void ring_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                   const ExecuteOptions& options = {});

}  // namespace annulus
