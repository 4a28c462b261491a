#pragma once

#include "sharding/execution.hpp"

namespace annulus {

/// Gathers one KV head of every needed row at a time, while the head before computes: one kernel
/// per KV head, nothing to merge, and a buffer of one head (the head-strided all-gather of long
/// context training). See execute_forward for the arguments.
void all_gather_forward(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                        const ExecuteOptions& options = {});

/// Partials of a head's dK and dV return while the next head computes.
void all_gather_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                         const ExecuteOptions& options = {});

}  // namespace annulus
