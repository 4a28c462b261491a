#include "sharding/execution.hpp"

#include "sharding/all_gather.hpp"
#include "sharding/hybrid.hpp"
#include "sharding/ring.hpp"
#include "sharding/ulysses.hpp"

namespace annulus {

void execute_forward(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                     const ExecuteOptions& options) {
  switch (plan.scheme()) {
    case Scheme::ring:
      return ring_forward(ranks, plan, local, options);
    case Scheme::all_gather:
      return all_gather_forward(ranks, plan, local, options);
    case Scheme::ulysses:
      return ulysses_forward(ranks, plan, local, options);
    case Scheme::hybrid:
      break;
  }
  HybridRanks groups(ranks, plan.head_ranks());
  hybrid_forward(groups, plan, local, options);
}

void execute_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                      const ExecuteOptions& options) {
  switch (plan.scheme()) {
    case Scheme::ring:
      return ring_backward(ranks, plan, local, options);
    case Scheme::all_gather:
      return all_gather_backward(ranks, plan, local, options);
    case Scheme::ulysses:
      return ulysses_backward(ranks, plan, local, options);
    case Scheme::hybrid:
      break;
  }
  HybridRanks groups(ranks, plan.head_ranks());
  hybrid_backward(groups, plan, local, options);
}

}  // namespace annulus
