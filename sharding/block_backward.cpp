#include "sharding/block_backward.hpp"

#include <algorithm>
#include <utility>

#include "kernels/error.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kFloatBytes = 4;

// The blocks of keys that come to each list of batch rows, by the first of them.
std::map<std::int64_t, std::vector<BlockNode>> key_blocks_of(const AttentionPlan& plan) {
  const PlanRequest& request = plan.request();
  std::map<std::int64_t, std::vector<BlockNode>> blocks;
  for (const Stage& stage : plan.stages()) {
    for (const StagePart& part :
         parts_of(stage, request.batch, Granularity::block, request.block_rows)) {
      blocks[part.batch.begin].push_back({0, part.column_begin / request.block_rows});
    }
  }
  return blocks;
}

std::int64_t key_gradient_bytes(const BackwardCall& local, const AttentionPlan& plan) {
  const AttentionProblem& problem = local.problem;
  return plan.request().batch * gradient_cell_rows(plan.request().block_rows) * problem.q_heads() *
         (problem.head_dim() + problem.value_dim()) * kFloatBytes;
}

// One KV head as if each of `heads` query heads had its own.
ConstTensorView repeated(const ConstTensorView& view, std::int64_t kv_head, std::int64_t heads) {
  ConstTensorView one = view.slice(2, {kv_head, kv_head + 1});
  one.shape[2] = heads;
  one.strides[2] = 0;
  return one;
}

template <typename View>
View rows_within(const View& view, int dim, Span batch, Span rows) {
  if (!view) return view;
  return (view.shape[0] > 1 ? view.slice(0, batch) : view).slice(dim, rows);
}

}  // namespace

BlockBackwardPass::BlockBackwardPass(const BackwardCall& local, const AttentionPlan& plan,
                                     const ExecuteOptions& options, bool dry)
    : local_(local),
      plan_(plan),
      options_(options),
      dry_(dry),
      q_positions_(positions_of(plan.q_layout().runs(plan.group()))),
      nodes_(plan.gradient_nodes(plan.group())),
      key_pool_(local.problem.q.device, key_gradient_bytes(local, plan), dry, local.stream) {
  for (auto& [batch_begin, list] : key_blocks_of(plan)) {
    trees_.emplace(batch_begin, BlockTree<QueryGradient>(std::move(list)));
  }
}

void BlockBackwardPass::add(const StagePart& part, const ConstTensorView& k,
                            const ConstTensorView& v, const Emit& emit) {
  const ScopedTimer timer(compute_seconds(options_));
  const std::int64_t block = plan_.request().q_block_rows;
  const std::int64_t seq_q = plan_.q_layout().seq();
  QueryGradient dq = take_queries(part.batch, query_rows(part));
  const Span columns{part.column_begin, part.column_begin + part.rows.size()};
  for (const Span cell : gradient_cells(columns, plan_.request().block_rows)) {
    const Span keys{cell.begin - columns.begin, cell.end - columns.begin};
    const Span all_rows{0, plan_.q_layout().rows(plan_.group())};
    const StagePart cell_part = part_within(part, all_rows, keys);
    const ConstTensorView cell_k = dry_ ? k : k.slice(1, keys);
    const ConstTensorView cell_v = dry_ ? v : v.slice(1, keys);
    for (std::size_t node = 0; node < nodes_.size(); ++node) {
      struct Leaf {
        BlockNode at;
        Span queries;
        StagePart part;
      };
      std::vector<Leaf> leaves;
      std::vector<BlockNode> blocks;
      const Span held = intersect(nodes_[node].blocks(), {0, (seq_q + block - 1) / block});
      for (std::int64_t b = held.begin; b < held.end; ++b) {
        const std::int64_t first = plan_.q_layout().local_row(b * block);
        const Span queries{first, first + std::min(block, seq_q - b * block)};
        StagePart leaf = part_within(cell_part, queries, {0, keys.size()});
        if (leaf.slices.slices.empty() || local_.problem.q_heads() == 0) continue;
        leaves.push_back({{0, b}, queries, std::move(leaf)});
        blocks.push_back({0, b});
      }
      if (leaves.empty()) {
        emit(node, keys, {}, {});
        continue;
      }
      BlockTree<KeyGradients> tree(std::move(blocks));
      for (const Leaf& leaf : leaves) {
        tree.add(leaf.at, compute(leaf.part, leaf.queries, cell_k, cell_v, view_of(dq)),
                 [this](KeyGradients& left, KeyGradients right) {
                   if (!dry_) {
                     accumulate(right.k, left.k, local_.stream);
                     accumulate(right.v, left.v, local_.stream);
                   }
                   key_pool_.give(std::move(right.memory));
                 });
      }
      KeyGradients& root = *tree.root();
      emit(node, keys, root.k, root.v);
      key_pool_.give(std::move(root.memory));
    }
  }
  add_queries(part, std::move(dq));
}

TensorView BlockBackwardPass::view_of(const QueryGradient& gradient) const {
  Shape shape = local_.problem.q.shape;
  shape[0] = gradient.batch;
  return {gradient.memory.data(), DType::f32, shape, local_.problem.q.device};
}

BlockBackwardPass::QueryGradient BlockBackwardPass::take_queries(Span batch, Span rows) {
  const auto found =
      std::find_if(spare_queries_.begin(), spare_queries_.end(),
                   [&](const QueryGradient& spare) { return spare.batch == batch.size(); });
  QueryGradient gradient;
  gradient.batch = batch.size();
  if (found != spare_queries_.end()) {
    gradient = std::move(*found);
    spare_queries_.erase(found);
  } else {
    const std::int64_t bytes = view_of(gradient).shape.elements() * kFloatBytes;
    query_bytes_ += bytes;
    if (!dry_) gradient.memory = Buffer(local_.problem.q.device, bytes, local_.stream);
  }
  gradient.rows = rows;
  if (!dry_) {
    fill_bytes(gradient.memory.data(), local_.problem.q.device, 0, gradient.memory.bytes(),
               local_.stream);
  }
  return gradient;
}

void BlockBackwardPass::add_queries(const StagePart& part, QueryGradient gradient) {
  BlockTree<QueryGradient>& tree = trees_.at(part.batch.begin);
  tree.add({0, part.column_begin / plan_.request().block_rows}, std::move(gradient),
           [this](QueryGradient& left, QueryGradient right) {
             if (!dry_) {
               accumulate(view_of(right).slice(1, right.rows), view_of(left).slice(1, right.rows),
                          local_.stream);
             }
             left.rows = {std::min(left.rows.begin, right.rows.begin),
                          std::max(left.rows.end, right.rows.end)};
             spare_queries_.push_back(std::move(right));
           });
  if (!tree.root()) return;
  add_root(part.batch.begin, *tree.root());
  spare_queries_.push_back(std::move(*tree.root()));
  tree.root().reset();
}

void BlockBackwardPass::add_root(std::int64_t batch_begin, const QueryGradient& root) {
  if (dry_ || !local_.grad_q) return;
  const Span batch{batch_begin, batch_begin + root.batch};
  accumulate(view_of(root).slice(1, root.rows), local_.grad_q.slice(0, batch).slice(1, root.rows),
             local_.stream);
}

BlockBackwardPass::KeyGradients BlockBackwardPass::take_keys(std::int64_t batch,
                                                             std::int64_t rows) {
  const AttentionProblem& problem = local_.problem;
  KeyGradients gradients;
  gradients.memory = key_pool_.take();
  const Shape k{batch, rows, problem.q_heads(), problem.head_dim()};
  const Shape v{batch, rows, problem.q_heads(), problem.value_dim()};
  auto* data = static_cast<float*>(gradients.memory.data());
  gradients.k = TensorView(data, DType::f32, k, problem.q.device);
  gradients.v = TensorView(dry_ ? data : data + k.elements(), DType::f32, v, problem.q.device);
  if (!dry_) {
    fill_bytes(data, problem.q.device, 0, (k.elements() + v.elements()) * kFloatBytes,
               local_.stream);
  }
  return gradients;
}

// The leaf of both trees: a block of queries and a cell of keys.
BlockBackwardPass::KeyGradients BlockBackwardPass::compute(const StagePart& leaf, Span queries,
                                                           const ConstTensorView& k,
                                                           const ConstTensorView& v,
                                                           const TensorView& grad_q) {
  KeyGradients into = take_keys(leaf.batch.size(), leaf.rows.size());
  if (dry_) return into;
  const std::vector<PositionRun> positions = positions_within(q_positions_, queries);
  BackwardCall call = local_;
  call.problem = problem_of_part(local_.problem, leaf, k, v, positions);
  call.problem.q = call.problem.q.slice(1, queries);
  call.problem.bias = rows_within(call.problem.bias, 2, {0, leaf.batch.size()}, queries);
  call.problem.dense_mask =
      rows_within(call.problem.dense_mask, 2, {0, leaf.batch.size()}, queries);
  call.grad_o = rows_within(local_.grad_o, 1, leaf.batch, queries);
  call.log_sum_exp = rows_within(local_.log_sum_exp, 2, leaf.batch, queries);
  call.delta = rows_within(local_.delta, 2, leaf.batch, queries);
  if (local_.o) call.o = rows_within(local_.o, 1, leaf.batch, queries);
  if (local_.grad_q) call.grad_q = grad_q.slice(1, queries);
  const Span columns{leaf.column_begin, leaf.column_begin + leaf.rows.size()};
  call.grad_bias = rows_within(local_.grad_bias, 2, leaf.batch, queries);
  if (call.grad_bias) call.grad_bias = call.grad_bias.slice(3, columns);
  call_kernel(call, k, v, into);
  return into;
}

void BlockBackwardPass::call_kernel(BackwardCall& call, const ConstTensorView& k,
                                    const ConstTensorView& v, const KeyGradients& into) {
  const AttentionProblem whole = call.problem;
  if (whole.q_heads() == whole.kv_heads()) {
    call.grad_k = into.k;
    call.grad_v = into.v;
    return attention_backward(call, options_.backend);
  }
  // Sums of their own for the query heads of a KV head: which of them share a rank must not matter.
  const BackwardCall all = call;
  for (std::int64_t kv_head = 0; kv_head < whole.kv_heads(); ++kv_head) {
    Span heads{0, 0};
    for (std::int64_t head = 0; head < whole.q_heads(); ++head) {
      if (whole.kv_head_of(head) != kv_head) continue;
      if (heads.empty()) heads.begin = head;
      heads.end = head + 1;
    }
    if (heads.empty()) continue;
    call.problem = with_heads(whole, heads, {kv_head, kv_head + 1}, {1, 0});
    call.problem.k = repeated(k, kv_head, heads.size());
    call.problem.v = repeated(v, kv_head, heads.size());
    call.grad_o = all.grad_o.slice(2, heads);
    call.log_sum_exp = all.log_sum_exp.slice(1, heads);
    call.delta = all.delta.slice(1, heads);
    if (all.o) call.o = all.o.slice(2, heads);
    if (all.grad_q) call.grad_q = all.grad_q.slice(2, heads);
    if (all.grad_bias && all.grad_bias.shape[1] > 1) {
      call.grad_bias = all.grad_bias.slice(1, heads);
    }
    call.grad_k = into.k.slice(2, heads);
    call.grad_v = into.v.slice(2, heads);
    attention_backward(call, options_.backend);
  }
}

std::int64_t BlockBackwardPass::buffer_bytes() const {
  return query_bytes_ + key_pool_.held_bytes();
}

}  // namespace annulus
