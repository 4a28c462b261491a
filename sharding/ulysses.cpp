#include "sharding/ulysses.hpp"

#include "sharding/hybrid.hpp"

namespace annulus {

// One group that exchanges heads, and nothing between groups.

void ulysses_forward(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                     const ExecuteOptions& options) {
  HybridRanks one_group(ranks, ranks.size());
  hybrid_forward(one_group, plan, local, options);
}

void ulysses_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                      const ExecuteOptions& options) {
  HybridRanks one_group(ranks, ranks.size());
  hybrid_backward(one_group, plan, local, options);
}

}  // namespace annulus
