#pragma once

#include <chrono>
#include <memory>
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

/// The kernel calls of a stage: as coarse as bias, dense mask and dropout allow, or the pieces that
/// are read in place, or the blocks of the plan's grid.
std::vector<StagePart> forward_parts(const Stage& stage, const AttentionProblem& problem,
                                     const AttentionPlan& plan, bool in_place);
std::vector<StagePart> backward_parts(const Stage& stage, const AttentionProblem& problem,
                                      const AttentionPlan& plan, bool in_place);

/// The batch rows and key columns of a part, of a tensor [batch|1, heads|1, rows, columns] over all
/// columns.
ConstTensorView columns_of(const ConstTensorView& view, const StagePart& part);
TensorView columns_of(const TensorView& view, const StagePart& part);

/// The part's share of a rank's problem, over the part's keys and values.
AttentionProblem problem_of_part(const AttentionProblem& local, const StagePart& part,
                                 const ConstTensorView& k, const ConstTensorView& v,
                                 std::span<const PositionRun> q_positions);

/// Running softmax of some rows in memory of its own.
struct OwnedState {
  Buffer memory;
  AttentionState views;

  OwnedState() = default;
  OwnedState(const AttentionProblem& problem, Stream stream);
};

/// The same call for some of its query heads; `groups` maps them to the KV heads that remain.
AttentionProblem with_heads(const AttentionProblem& problem, Span q_heads, Span kv_heads,
                            const HeadGroups& groups);

/// Rows of `state` before any key: sinks are folded in here.
void start_rows(const ForwardCall& local, const AttentionState& state,
                const ExecuteOptions& options);

/// Where computation is timed; a place that nobody reads without a report.
double& compute_seconds(const ExecuteOptions& options);

/// The forward pass of one rank's query rows over parts that arrive one by one.
class ForwardPass {
 public:
  virtual ~ForwardPass() = default;
  /// `last`: no part follows, so that the kernel may write O at once.
  virtual void add(const StagePart& part, const ConstTensorView& k, const ConstTensorView& v,
                   bool last) = 0;
  /// Writes O and LSE unless the last part did.
  virtual void finish() = 0;
  virtual std::int64_t buffer_bytes() const = 0;
};

/// One running state, or the tree of blocks where the plan has a grid.
std::unique_ptr<ForwardPass> make_forward_pass(const ForwardCall& local, const AttentionPlan& plan,
                                               const ExecuteOptions& options);

}  // namespace annulus
