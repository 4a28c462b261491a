#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <vector>

#include "sharding/gradient_tree.hpp"
#include "sharding/stage_compute.hpp"

namespace annulus {

/// A backward pass whose bits do not depend on how rows are spread over ranks. Each pair of a block
/// of the grid of queries and a cell of keys is a kernel call of its own. dQ is summed over the
/// blocks of keys, dK and dV over those of queries, both in the binary tree over the block index.
/// Holds about two partials a level.
class BlockBackwardPass {
 public:
  /// dK and dV of rows [rows) of a part from the queries of this rank's node number `node`:
  /// [batch rows of the part, rows, q_heads, dim]; absent where none of them sees the rows.
  using Emit = std::function<void(std::size_t node, Span rows, const ConstTensorView& grad_k,
                                  const ConstTensorView& grad_v)>;

  /// `dry`: computes nothing and only counts memory; the views of `local` may be null.
  BlockBackwardPass(const BackwardCall& local, const AttentionPlan& plan,
                    const ExecuteOptions& options, bool dry = false);

  /// Takes the parts of forward_parts(), each once.
  void add(const StagePart& part, const ConstTensorView& k, const ConstTensorView& v,
           const Emit& emit);
  std::int64_t buffer_bytes() const;

 private:
  struct QueryGradient {
    Buffer memory;
    Span rows;  // of the query rows; the others hold zeros
    std::int64_t batch = 0;
  };

  struct KeyGradients {
    Buffer memory;
    TensorView k;
    TensorView v;
  };

  TensorView view_of(const QueryGradient& gradient) const;
  QueryGradient take_queries(Span batch, Span rows);
  void add_queries(const StagePart& part, QueryGradient gradient);
  void add_root(std::int64_t batch_begin, const QueryGradient& root);
  KeyGradients take_keys(std::int64_t batch, std::int64_t rows);
  KeyGradients compute(const StagePart& leaf, Span queries, const ConstTensorView& k,
                       const ConstTensorView& v, const TensorView& grad_q);
  void call_kernel(BackwardCall& call, const ConstTensorView& k, const ConstTensorView& v,
                   const KeyGradients& into);

  const BackwardCall& local_;
  const AttentionPlan& plan_;
  const ExecuteOptions& options_;
  bool dry_;
  std::vector<PositionRun> q_positions_;
  std::vector<BlockNode> nodes_;
  std::map<std::int64_t, BlockTree<QueryGradient>> trees_;  // by first batch row
  std::vector<QueryGradient> spare_queries_;
  std::int64_t query_bytes_ = 0;
  PartialPool key_pool_;
};

}  // namespace annulus
