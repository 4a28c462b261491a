#pragma once

#include <chrono>
#include <vector>

#include "kernels/buffer.hpp"
#include "sharding/execution.hpp"
#include "sharding/stage_parts.hpp"

namespace annulus {

/// Adds the time of its life to a sum.
class ScopedTimer {
 public:
  explicit ScopedTimer(double& seconds) : seconds_(seconds) {}
  ~ScopedTimer() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }
  ScopedTimer(const ScopedTimer&) = delete;
  ScopedTimer& operator=(const ScopedTimer&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

/// The coarsest cut that bias, dense mask and dropout of a problem allow.
Granularity granularity_of(const AttentionProblem& problem);

/// The same call for some of its query heads; `groups` maps them to the KV heads that remain.
AttentionProblem with_heads(const AttentionProblem& problem, Span q_heads, Span kv_heads,
                            const HeadGroups& groups);

/// The forward pass of one rank's query rows over parts that arrive one by one.
class ForwardPass {
 public:
  ForwardPass(const ForwardCall& local, std::span<const RowRun> q_runs,
              const ExecuteOptions& options);

  /// `last`: no part follows, so that the kernel may write O at once.
  void add(const StagePart& part, const ConstTensorView& k, const ConstTensorView& v, bool last);
  /// Writes O and LSE unless the last part did.
  void finish();
  std::int64_t buffer_bytes() const { return memory_.bytes(); }

 private:
  void begin();
  void allocate_state();
  ForwardCall call_of(const AttentionProblem& problem, Span batch) const;

  const ForwardCall& local_;
  std::vector<PositionRun> q_positions_;
  const ExecuteOptions& options_;
  Buffer memory_;
  AttentionState state_;
  bool started_ = false;
  bool finished_ = false;
};

/// The backward pass of one rank's query rows; gradients of K and V go where each part says.
class BackwardPass {
 public:
  BackwardPass(const BackwardCall& local, std::span<const RowRun> q_runs,
               const ExecuteOptions& options);

  void add(const StagePart& part, const ConstTensorView& k, const ConstTensorView& v,
           const TensorView& grad_k, const TensorView& grad_v);

 private:
  const BackwardCall& local_;
  std::vector<PositionRun> q_positions_;
  const ExecuteOptions& options_;
};

}  // namespace annulus
