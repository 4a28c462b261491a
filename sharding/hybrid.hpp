#pragma once

#include <memory>

#include "sharding/execution.hpp"

namespace annulus {

/// The two groups that a rank of a hybrid plan belongs to: parts of the communicator, which keeps
/// them for every attention over it.
class HybridRanks {
 public:
  /// `head_ranks` consecutive ranks exchange heads; those with the same place exchange KV.
  /// Collective the first time for these numbers.
  HybridRanks(Communicator& ranks, int head_ranks);

  Communicator& heads() { return *heads_; }
  Communicator& groups() { return *groups_; }

 private:
  std::unique_ptr<Communicator> alone_;
  Communicator* heads_;
  Communicator* groups_;
};

/// Consecutive ranks that can read each other's memory, the same for every node, else 1: what
/// PlanRequest::node_ranks should be. Collective.
int find_node_ranks(Communicator& ranks);

/// Ulysses inside a node, ring between nodes (USP, Fang and Zhao, 2024): only KV of a share of the
/// heads crosses the network. See execute_forward for the arguments.
void hybrid_forward(HybridRanks& ranks, const AttentionPlan& plan, const ForwardCall& local,
                    const ExecuteOptions& options = {});
void hybrid_backward(HybridRanks& ranks, const AttentionPlan& plan, const BackwardCall& local,
                     const ExecuteOptions& options = {});

}  // namespace annulus
