#pragma once

#include "runtime/attention_call.hpp"
#include "runtime/tensor.hpp"

namespace annulus {

/// Adds what several ranks computed for the same element, in rank order: every rank that holds it
/// ends with the same bits. All calls are collective over the ranks of the attention call.
class GradientSum {
 public:
  explicit GradientSum(const AttentionCall& call) : call_(call) {}

  /// [batch, rows, kv_heads, width] of keys or values, over the ranks that hold whole keys and
  /// over those that share a KV head.
  DistributedTensor keys(Tensor gradient, const TensorLayout& layout) const;
  /// [batch|1, q_heads|1, rows, columns]: over batch rows and heads that share one bias; the
  /// result has the heads of the bias.
  DistributedTensor bias(Tensor gradient) const;
  /// [q_heads], shaped as the sinks are.
  DistributedTensor sinks(Tensor gradient) const;
  /// The same from log-sum-exp and delta [batch, q_heads, rows], of whole blocks of a grid of query
  /// rows: its bits do not depend on which rank has which of them.
  DistributedTensor sinks_over_blocks(const ConstTensorView& sinks,
                                      const ConstTensorView& log_sum_exp,
                                      const ConstTensorView& delta, std::int64_t block_rows) const;

 private:
  void over(Communicator& ranks, Tensor& gradient) const;
  DistributedTensor as_sinks(Tensor gradient) const;
  DistributedTensor over_shared_heads(Tensor gradient, const TensorLayout& layout) const;

  const AttentionCall& call_;
};

}  // namespace annulus
