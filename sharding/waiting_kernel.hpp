#pragma once

#include "kernels/cuda_support.hpp"
#include "sharding/execution.hpp"

namespace annulus {

/// Whether the kernel call of every stage is one with the same queries, which a launch over
/// segments can then be. The same on all ranks where `problem` differs in its rows only.
inline bool may_compute_segments(const AttentionPlan& plan, const AttentionProblem& problem,
                                 const ExecuteOptions& options) {
  return options.one_launch && problem.q.device == Device::cuda && !problem.bias &&
         !problem.dense_mask && problem.dropout.probability == 0.0F &&
         plan.request().block_rows == 0 && kernels::cuda::takes_segments(problem, options.backend);
}

/// A kernel waits for rows which, when an exception passes, nobody brings any more.
class WaitingKernel {
 public:
  explicit WaitingKernel(const kernels::cuda::ReadyWords& ready) : ready_(ready) {}
  ~WaitingKernel() {
    if (waits_) kernels::cuda::release_words(ready_);
  }
  WaitingKernel(const WaitingKernel&) = delete;
  WaitingKernel& operator=(const WaitingKernel&) = delete;
  void has_all() { waits_ = false; }

 private:
  kernels::cuda::ReadyWords ready_;
  bool waits_ = true;
};

}  // namespace annulus
