#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/attention_inputs.hpp"
#include "runtime/decode_operation.hpp"
#include "runtime/key_value_cache.hpp"

namespace annulus {

/// How one decode call lies on the mesh: sequences along the batch axes, query heads along the head
/// axes, each with the KV head or heads it needs; all ranks of a sequence group have all query
/// rows. A value computed from global facts alone, hence the same on all ranks. Tensors are
/// [batch, seq, heads, dim]; packed queries have one batch row, whose tokens the batch axes split.
struct DecodeSetup {
  Shape query;  // [batch, seq, q_heads, head_dim], the rope part included
  std::int64_t kv_heads = 1;
  std::int64_t value_dim = 0;
  bool packed = false;  // thd
  Mesh mesh;
  CacheAxes axes;
  std::vector<std::int64_t> query_begin = {};  // of all sequences, and the end

  std::int64_t sequences() const { return static_cast<std::int64_t>(query_begin.size()) - 1; }
  std::vector<std::int64_t> rows() const;
  /// Sequences and query rows of a rank's batch part.
  Span sequences_of(int rank) const;
  Span rows_of(int rank) const;

  TensorLayout query_layout(std::int64_t dim) const;
  TensorLayout new_layout(std::int64_t dim) const;  // of new keys or values
  /// Of a cache that is given as tensors [batch, seq, kv_heads, dim]: one block of tokens a rank.
  TensorLayout given_layout(std::int64_t seq, std::int64_t dim) const;
  CacheDeal given_deal(std::int64_t seq, int rank) const;
  TensorLayout output() const;
  TensorLayout log_sum_exp() const;  // [batch, q_heads, seq]
  TensorLayout sinks() const;
  /// Output whose heads are also cut among the ranks of a sequence group, as they merge them.
  TensorLayout split_output() const;
  TensorLayout split_log_sum_exp() const;

 private:
  TensorLayout tokens_by_heads(std::int64_t heads, std::int64_t dim) const;
};

/// Throws usage and bad_data for what an operation does not take.
DecodeSetup make_decode_setup(const DecodeOperation& operation, const AttentionInputs& inputs,
                              const AttentionOptions& options);

}  // namespace annulus
