#include "sharding/backward_pass.hpp"

#include "sharding/block_backward.hpp"

namespace annulus {
namespace {

class AddingBackwardPass final : public BackwardPass {
 public:
  AddingBackwardPass(const BackwardCall& local, std::span<const RowRun> q_runs,
                     const ExecuteOptions& options)
      : local_(local), q_positions_(positions_of(q_runs)), options_(options) {}

  void add(const Stage& stage, const StagePart& part, const ConstTensorView& k,
           const ConstTensorView& v, GradientReturn& back) override {
    if (local_.problem.q.shape.elements() == 0) return;
    const ScopedTimer timer(compute_seconds(options_));
    const KvViews& gradients = back.partials(stage).front();
    BackwardCall call = local_;
    call.problem = problem_of_part(local_.problem, part, k, v, q_positions_);
    call.grad_o = local_.grad_o.slice(0, part.batch);
    call.log_sum_exp = local_.log_sum_exp.slice(0, part.batch);
    call.delta = local_.delta.slice(0, part.batch);
    if (local_.o) call.o = local_.o.slice(0, part.batch);
    if (local_.grad_q) call.grad_q = local_.grad_q.slice(0, part.batch);
    call.grad_k = gradients.k.slice(0, part.batch).slice(1, part.rows);
    call.grad_v = gradients.v.slice(0, part.batch).slice(1, part.rows);
    call.grad_bias = columns_of(local_.grad_bias, part);
    attention_backward(call, options_.backend);
  }

  std::int64_t buffer_bytes() const override { return 0; }

 private:
  const BackwardCall& local_;
  std::vector<PositionRun> q_positions_;
  const ExecuteOptions& options_;
};

class TreeBackwardPass final : public BackwardPass {
 public:
  TreeBackwardPass(const BackwardCall& local, const AttentionPlan& plan,
                   const ExecuteOptions& options)
      : plan_(plan), blocks_(local, plan, options) {}

  void add(const Stage& stage, const StagePart& part, const ConstTensorView& k,
           const ConstTensorView& v, GradientReturn& back) override {
    blocks_.add(part, k, v,
                [&](std::size_t node, Span rows, const ConstTensorView& grad_k,
                    const ConstTensorView& grad_v) {
                  const Span held{part.rows.begin + rows.begin, part.rows.begin + rows.end};
                  if (stage.number == 0) {
                    add_own(node, part.batch, held, grad_k, grad_v, back.tree());
                  } else if (grad_k.rank() > 0) {
                    const KvViews& partial = back.partials(stage)[node];
                    copy(grad_k, partial.k.slice(0, part.batch).slice(1, held));
                    copy(grad_v, partial.v.slice(0, part.batch).slice(1, held));
                  }
                });
  }

  std::int64_t buffer_bytes() const override { return blocks_.buffer_bytes(); }

 private:
  void add_own(std::size_t node, Span batch, Span rows, const ConstTensorView& grad_k,
               const ConstTensorView& grad_v, GradientTree& tree) const {
    for (std::int64_t b = batch.begin; b < batch.end; ++b) {
      const Span one{b - batch.begin, b - batch.begin + 1};
      const bool any = grad_k.rank() > 0;
      tree.add(plan_.group(), node, b, rows, KvSide::key, any ? grad_k.slice(0, one) : grad_k);
      tree.add(plan_.group(), node, b, rows, KvSide::value, any ? grad_v.slice(0, one) : grad_v);
    }
  }

  const AttentionPlan& plan_;
  BlockBackwardPass blocks_;
};

}  // namespace

std::unique_ptr<BackwardPass> make_backward_pass(const BackwardCall& local,
                                                 const AttentionPlan& plan,
                                                 const ExecuteOptions& options) {
  if (plan.request().q_block_rows > 0) {
    return std::make_unique<TreeBackwardPass>(local, plan, options);
  }
  return std::make_unique<AddingBackwardPass>(local, plan.q_layout().runs(plan.group()), options);
}

}  // namespace annulus
