#pragma once

#include <optional>
#include <vector>

#include "runtime/decode_setup.hpp"
#include "runtime/statement.hpp"
#include "sharding/decode_merge.hpp"

namespace annulus {

/// One call of an operation over a cache on one rank. The constructor checks; agree() compares with
/// the other ranks; run() brings, writes, attends and merges.
class CacheCall {
 public:
  /// Never throws for what the caller passed: agree() does, on all ranks together.
  CacheCall(const DecodeOperation& operation, const AttentionInputs& inputs,
            const AttentionOptions& options, Device device);

  /// Throws on all ranks when one of them failed or they differ in what they were asked to do.
  /// Collective.
  void agree();
  /// Collective. @pre agree() has returned
  OperationOutput run();

 private:
  void state(Statement& statement) const;
  /// A tensor in a working layout, of the cache's dtype unless another is named.
  Tensor bring(const DistributedTensor& from, DimOrder order, const TensorLayout& to, DType dtype);
  Tensor bring_joined(const DistributedTensor& latent, const DistributedTensor& rope, bool query);
  DistributedTensor leave(Tensor local, const TensorLayout& working, const TensorLayout& wanted);
  void write_new();
  void find_problem();
  OperationOutput attend();
  ConstTensorView integers(const std::vector<std::int64_t>& values);
  Communicator& sequence_group() const;

  const DecodeOperation& operation_;
  const AttentionInputs& inputs_;
  const AttentionOptions& options_;
  Device device_;
  Context& context_;
  int rank_;

  std::optional<Error> failure_;
  std::optional<DecodeSetup> setup_;
  DType dtype_ = DType::f32;
  DecodeProblem problem_;
  std::vector<Tensor> tensors_;  // that the problem points into
  std::optional<CacheView> cache_;
  OperationReport report_;
};

}  // namespace annulus
