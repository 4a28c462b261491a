#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "runtime/context.hpp"
#include "runtime/distributed_tensor.hpp"
#include "runtime/tensor.hpp"

namespace annulus {

/// What one call cost this rank.
struct OperationReport {
  double compute_seconds = 0.0;
  double exposed_communication_seconds = 0.0;
  std::int64_t bytes_sent = 0;
  std::int64_t bytes_in_place = 0;  // of other ranks, read where they lie
  std::int64_t buffer_bytes = 0;
  /// Largest over mean of the kept pairs of the ranks: the same on all of them.
  double imbalance = 1.0;
  /// Kept (query, key) pairs times query heads, over all ranks and batch rows.
  double pairs = 0.0;
};

class KeyValueCache;

/// Keys and values as an operation with a cache leaves them for the next call: as tensors, or in
/// the pages that the call was given.
struct CacheView {
  DistributedTensor key;    // [batch, seq_kv, kv_heads, head_dim]
  DistributedTensor value;  // [batch, seq_kv, kv_heads, value_dim]
  std::shared_ptr<KeyValueCache> pages = nullptr;
};

/// The whole tensors, as gather() assembles them.
struct GatheredOutput {
  Tensor attention_outputs;
  Tensor attention_weights;
  Tensor log_sum_exp;
};

/// Results of an operation, each left where it was computed; any of them may be absent.
struct OperationOutput {
  DistributedTensor attention_outputs;  // [batch, seq_q, q_heads, value_dim]
  DistributedTensor attention_weights;  // [batch, q_heads, seq_q, seq_kv]
  DistributedTensor log_sum_exp;        // f32 [batch, q_heads, seq_q], natural logarithm
  std::optional<CacheView> cache_view;
  OperationReport report;

  /// The global tensors on `root`, absent elsewhere; on all ranks without a root. Throws usage on
  /// all ranks when they name different ones. Collective.
  GatheredOutput gather(Context& context, std::optional<int> root = std::nullopt) const;
};

/// Gradients of an operation, f32; absent where the input is.
struct OperationGradients {
  DistributedTensor query;
  DistributedTensor key;
  DistributedTensor value;
  DistributedTensor bias;
  DistributedTensor sinks;
  OperationReport report;
};

}  // namespace annulus
