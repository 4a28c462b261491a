#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/attention.hpp"
#include "runtime/attention_operation.hpp"
#include "runtime/statement.hpp"
#include "sharding/execution.hpp"

namespace annulus {

/// An input where the work is: the caller's memory, or a moved or cast copy of it.
struct WorkingInput {
  DistributedTensor moved;
  Tensor cast;
  ConstTensorView view;  // absent where the input is
};

/// One call of an attention operation on one rank. The constructor checks and plans; agree()
/// compares with the other ranks; then the inputs are brought and the work is done.
class AttentionCall {
 public:
  /// Never throws for what the caller passed: agree() does, on all ranks together.
  AttentionCall(const AttentionOperation& operation, const AttentionInputs& inputs,
                const AttentionOptions& options, Device device);

  /// Runs `step` unless something failed before, and keeps what it throws for agree(). It may look
  /// at setup().
  void check(const std::function<void()>& step);

  /// Throws on all ranks when one of them failed or they differ in what they were asked to do.
  /// `extra` inputs have their layouts compared too. Collective.
  void agree(const std::vector<const DistributedTensor*>& extra = {});

  /// @pre agree() has returned, here and below; but for setup() inside check()
  const AttentionSetup& setup() const { return *setup_; }
  OperationReport& report() { return report_; }
  Device device() const { return device_; }
  int rank() const { return rank_; }

  /// Query, key and value (and what else there is) in their working layouts. Collective.
  void bring_inputs();
  /// Any tensor in a working layout. Collective.
  WorkingInput bring(const DistributedTensor& from, DimOrder order, const TensorLayout& to,
                     DType dtype);
  /// A result, moved to where the caller's tensors are. Collective.
  DistributedTensor leave(DistributedTensor result, const TensorLayout& wanted);
  DistributedTensor leave(Tensor local, const TensorLayout& working, const TensorLayout& wanted) {
    return leave(DistributedTensor(std::move(local), working, rank_), wanted);
  }

  /// An uninitialised local tensor of a working layout.
  Tensor local(DType dtype, const TensorLayout& layout) const;
  AttentionProblem problem() const;
  void forward(const TensorView& o, const TensorView& log_sum_exp);
  void backward(BackwardCall& call);
  /// Whether backward() is one call of a kernel, which may then overwrite the keys' gradients.
  bool is_one_backward() const;
  /// P of every row, into `weights` [batch, q_heads, seq_q, seq_kv]. Keys must be whole.
  void weights(const TensorView& weights);

  Communicator& world() const { return context_.world(); }
  /// Ranks that differ from this one in sequence rows only, batch rows only, heads only.
  Communicator& sequence_group() const { return along(setup_->sequence_axes); }
  Communicator& batch_group() const { return along(setup_->batch_axes); }
  Communicator& head_group() const { return along(setup_->head_axes); }

  /// Copies of key and value as they were brought.
  CacheView cache() const;

 private:
  Communicator& along(const AxisTuple& axes) const { return context_.along(setup_->mesh(), axes); }
  /// The sequence group that moves what the kernels read: device memory where that is.
  Communicator& kernel_ranks() const;
  void plan();
  void backward_over_blocks(BackwardCall& call, const ExecuteOptions& options);
  void state(Statement& statement) const;
  WorkingInput bring_pairs(const DistributedTensor* from, const std::optional<TensorLayout>& to,
                           DType dtype);
  std::int64_t kept_pairs() const;
  /// Whether the whole sequence group has nothing to do: no batch rows, no heads.
  bool idle() const;
  ExecuteOptions execute_options(ExecutionReport& execution, const AttentionProblem& problem,
                                 Direction direction) const;
  void finish_on_device(ExecutionReport& execution,
                        std::chrono::steady_clock::time_point begin) const;
  void account(const ExecutionReport& execution);

  const AttentionOperation& operation_;
  const AttentionInputs& inputs_;
  const AttentionOptions& options_;
  Device device_;
  Context& context_;
  int rank_;

  std::optional<Error> failure_;
  std::optional<AttentionSetup> setup_;
  MaskSlices mask_;                     // of this rank's batch rows
  MaskSlices local_mask_;               // its rows against all keys, where keys are whole
  std::vector<PositionRun> positions_;  // of its query rows
  std::optional<AttentionPlan> plan_;   // where keys are dealt, or blocks of them are merged
  // Where keys are whole and blocks are merged: the gradients of keys, dealt to the ranks.
  std::optional<AttentionPlan> gradient_plan_;
  OperationReport report_;

  WorkingInput query_;
  WorkingInput key_;
  WorkingInput value_;
  WorkingInput bias_;
  WorkingInput dense_mask_;
  WorkingInput sinks_;
};

}  // namespace annulus
