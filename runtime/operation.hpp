#pragma once

#include <string>
#include <string_view>

#include "runtime/attention_inputs.hpp"
#include "runtime/operation_metadata.hpp"
#include "runtime/operation_output.hpp"

namespace annulus {

/// An attention operation. A new one implements forward_native() and layouts(); the other forms
/// default to one another: cpu and gpu to native, cuda and rocm to gpu. Calls are collective over
/// the ranks of the context.
class OperationImpl {
 public:
  /// `name`: the one it was registered under. Throws usage for metadata without a context.
  OperationImpl(std::string name, OperationMetadata metadata);
  virtual ~OperationImpl() = default;
  OperationImpl(const OperationImpl&) = delete;
  OperationImpl& operator=(const OperationImpl&) = delete;

  const std::string& name() const { return name_; }
  const OperationMetadata& metadata() const { return metadata_; }

  /// Picks the form by metadata.backend (cpu, gpu, cuda, cudnn, rocm), or native where the
  /// environment's FORCE_NATIVE_RUNTIME is true, yes, ok or 1. Throws usage naming any other
  /// backend.
  OperationOutput operator()(const AttentionInputs& inputs, const AttentionOptions& options = {});

  virtual OperationOutput forward_native(const AttentionInputs& inputs,
                                         const AttentionOptions& options) = 0;
  virtual OperationOutput forward_cpu(const AttentionInputs& inputs,
                                      const AttentionOptions& options);
  virtual OperationOutput forward_gpu(const AttentionInputs& inputs,
                                      const AttentionOptions& options);
  virtual OperationOutput forward_cuda(const AttentionInputs& inputs,
                                       const AttentionOptions& options);
  virtual OperationOutput forward_rocm(const AttentionInputs& inputs,
                                       const AttentionOptions& options);

  /// Gradients for `grad_output` [batch, seq_q, q_heads, value_dim], given what the forward call
  /// took and returned (attention_outputs and log_sum_exp). Throws usage where an operation has
  /// none.
  virtual OperationGradients backward(const AttentionInputs& inputs,
                                      const AttentionOptions& options,
                                      const OperationOutput& output,
                                      const DistributedTensor& grad_output);

  /// Where this operation works on an attention of `shape`: for readers that can put data there at
  /// once. The same on all ranks.
  virtual AttentionLayouts layouts(const AttentionShape& shape,
                                   const AttentionOptions& options) const = 0;

  virtual bool causal_by_default() const { return false; }
  /// metadata.requires_cache, else the operation's own default.
  bool requires_cache() const { return metadata_.requires_cache.value_or(caches_by_default()); }

 protected:
  virtual bool caches_by_default() const { return false; }
  /// The tuning registered for this operation.
  const OperationTuning& tuning() const { return tuning_; }

 private:
  std::string name_;
  OperationMetadata metadata_;
  OperationTuning tuning_;
};

/// Whether FORCE_NATIVE_RUNTIME asks for the native form.
bool native_is_forced();

}  // namespace annulus
