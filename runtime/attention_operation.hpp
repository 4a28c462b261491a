#pragma once

#include <memory>
#include <string>
#include <utility>

#include "runtime/attention_setup.hpp"
#include "runtime/operation.hpp"
#include "sharding/attention_plan.hpp"

namespace annulus {

/// The common course of the attention operations: check, plan, compare with the other ranks, bring
/// the inputs to where the work is, compute, leave the results where the query lies. What differs
/// is whether keys are dealt and by which scheme they travel.
class AttentionOperation : public OperationImpl {
 public:
  struct Traits {
    bool causal = false;
    KeyRows key_rows = KeyRows::whole;
    Scheme scheme = Scheme::ring;  // where keys are dealt
    bool weights = false;          // can return attention_weights
    bool vendor = false;           // by the vendor library where it can
  };

  AttentionOperation(std::string name, OperationMetadata metadata, const Traits& traits)
      : OperationImpl(std::move(name), std::move(metadata)), traits_(traits) {}

  /// On the CPU.
  OperationOutput forward_native(const AttentionInputs& inputs,
                                 const AttentionOptions& options) override;
  /// On this rank's device.
  OperationOutput forward_cuda(const AttentionInputs& inputs,
                               const AttentionOptions& options) override;
  OperationGradients backward(const AttentionInputs& inputs, const AttentionOptions& options,
                              const OperationOutput& output,
                              const DistributedTensor& grad_output) override;
  AttentionLayouts layouts(const AttentionShape& shape,
                           const AttentionOptions& options) const override;
  bool causal_by_default() const override { return traits_.causal; }

  const Traits& traits() const { return traits_; }
  bool causal(const AttentionOptions& options) const {
    return options.causal.value_or(traits_.causal);
  }
  /// Completes a request by how keys travel, from facts that all ranks of its group share;
  /// overridden where that is a choice.
  virtual std::shared_ptr<const PlanRequest> choose(PlanRequest request,
                                                    const AttentionShape& shape) const;
  using OperationImpl::tuning;

 private:
  Traits traits_;
};

}  // namespace annulus
