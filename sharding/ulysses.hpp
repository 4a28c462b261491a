#pragma once

#include "sharding/execution.hpp"

namespace annulus {

/// DeepSpeed-Ulysses (Jacobs et al., 2023): ranks exchange heads against rows, each computes the
/// whole sequence for its share of the heads, and results return. Heads need not divide; a KV head
/// goes once to each rank whose query heads use it. See execute_forward for the arguments.
void ulysses_forward(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                     const ExecuteOptions& options = {});
void ulysses_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                      const ExecuteOptions& options = {});

}  // namespace annulus
