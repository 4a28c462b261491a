#include "sharding/stage_compute.hpp"

#include "sharding/block_forward.hpp"

namespace annulus {
namespace {

template <typename View>
View batch_slice(const View& view, Span batch) {
  return view && view.shape[0] > 1 ? view.slice(0, batch) : view;
}

template <typename View>
View head_slice(const View& view, Span heads) {
  return view && view.shape[1] > 1 ? view.slice(1, heads) : view;
}

template <typename View>
View columns_of_part(const View& view, const StagePart& part) {
  if (!view) return view;
  return batch_slice(view, part.batch)
      .slice(3, {part.column_begin, part.column_begin + part.rows.size()});
}

// The coarsest cut that bias, dense mask and dropout of a problem allow.
Granularity granularity_of(const AttentionProblem& problem) {
  if (problem.bias || problem.dense_mask) return Granularity::run;
  return problem.dropout.probability > 0.0F ? Granularity::positions : Granularity::stage;
}

AttentionProblem problem_without_keys(const AttentionProblem& local) {
  StagePart nothing;
  nothing.batch = {0, local.batch()};
  const Span none{0, 0};
  return problem_of_part(local, nothing, local.k.slice(0, nothing.batch).slice(1, none),
                         local.v.slice(0, nothing.batch).slice(1, none), {});
}

void finish_rows_without_keys(const ForwardCall& local, const ExecuteOptions& options) {
  ForwardCall call;
  call.problem = problem_without_keys(local.problem);
  call.o = local.o;
  call.log_sum_exp = local.log_sum_exp;
  call.stream = local.stream;
  attention_forward(call, options.backend);
}

class StateForwardPass final : public ForwardPass {
 public:
  StateForwardPass(const ForwardCall& local, std::span<const RowRun> q_runs,
                   const ExecuteOptions& options)
      : local_(local),
        q_positions_(positions_of(q_runs)),
        options_(options),
        finished_(local.problem.q.shape.elements() == 0) {}

  void add(const StagePart& part, const ConstTensorView& k, const ConstTensorView& v,
           bool last) override {
    if (finished_) return;
    const ScopedTimer timer(compute_seconds(options_));
    const bool whole_batch = part.batch.size() == local_.problem.batch();
    const bool ends = last && whole_batch;
    if (!started_ && !whole_batch) begin();
    if (!started_ && !ends) state_ = OwnedState(local_.problem, local_.stream);
    ForwardCall call =
        call_of(problem_of_part(local_.problem, part, k, v, q_positions_), part.batch);
    if (ends) {
      call.o = local_.o;
      call.log_sum_exp = local_.log_sum_exp;
    }
    attention_forward(call, options_.backend);
    started_ = true;
    finished_ = ends;
  }

  void finish() override {
    if (finished_) return;
    const ScopedTimer timer(compute_seconds(options_));
    finished_ = true;
    if (!started_) return finish_rows_without_keys(local_, options_);
    annulus::finish(state_.views, local_.o, local_.log_sum_exp, local_.stream);
  }

  std::int64_t buffer_bytes() const override { return state_.memory.bytes(); }

 private:
  ForwardCall call_of(const AttentionProblem& problem, Span batch) const {
    ForwardCall call;
    call.problem = problem;
    call.stream = local_.stream;
    if (state_.memory.bytes() == 0) return call;
    call.state = {state_.views.accumulator.slice(0, batch), state_.views.row_max.slice(0, batch),
                  state_.views.row_sum.slice(0, batch)};
    call.start = started_ ? ForwardCall::Start::resume : ForwardCall::Start::fresh;
    return call;
  }

  void begin() {
    state_ = OwnedState(local_.problem, local_.stream);
    start_rows(local_, state_.views, options_);
    started_ = true;
  }

  const ForwardCall& local_;
  std::vector<PositionRun> q_positions_;
  const ExecuteOptions& options_;
  OwnedState state_;
  bool started_ = false;
  bool finished_ = false;
};

}  // namespace

double& compute_seconds(const ExecuteOptions& options) {
  thread_local double unused = 0.0;
  return options.report == nullptr ? unused : options.report->compute_seconds;
}

ConstTensorView columns_of(const ConstTensorView& view, const StagePart& part) {
  return columns_of_part(view, part);
}

TensorView columns_of(const TensorView& view, const StagePart& part) {
  return columns_of_part(view, part);
}

std::vector<StagePart> forward_parts(const Stage& stage, const AttentionProblem& problem,
                                     const AttentionPlan& plan, bool in_place) {
  const std::int64_t block_rows = plan.request().block_rows;
  if (block_rows > 0) return parts_of(stage, problem.batch(), Granularity::block, block_rows);
  return parts_of(stage, problem.batch(), in_place ? Granularity::piece : granularity_of(problem));
}

std::vector<StagePart> backward_parts(const Stage& stage, const AttentionProblem& problem,
                                      const AttentionPlan& plan, bool in_place) {
  if (plan.request().q_block_rows > 0) return forward_parts(stage, problem, plan, in_place);
  return parts_of(stage, problem.batch(), in_place ? Granularity::piece : granularity_of(problem));
}

AttentionProblem problem_of_part(const AttentionProblem& local, const StagePart& part,
                                 const ConstTensorView& k, const ConstTensorView& v,
                                 std::span<const PositionRun> q_positions) {
  AttentionProblem problem = local;
  problem.q = local.q.slice(0, part.batch);
  problem.k = k;
  problem.v = v;
  problem.mask = part.slices.view();
  problem.bias = columns_of(local.bias, part);
  problem.dense_mask = columns_of(local.dense_mask, part);
  problem.dropout.batch_begin += part.batch.begin;
  problem.dropout.q_positions = q_positions;
  problem.dropout.k_positions = part.positions;
  return problem;
}

AttentionProblem with_heads(const AttentionProblem& problem, Span q_heads, Span kv_heads,
                            const HeadGroups& groups) {
  AttentionProblem some = problem;
  some.q = problem.q.slice(2, q_heads);
  some.k = problem.k.slice(2, kv_heads);
  some.v = problem.v.slice(2, kv_heads);
  some.groups = groups;
  if (problem.sinks) some.sinks = problem.sinks.slice(0, q_heads);
  some.bias = head_slice(problem.bias, q_heads);
  some.dense_mask = head_slice(problem.dense_mask, q_heads);
  some.dropout.q_head_begin += q_heads.begin;
  return some;
}

OwnedState::OwnedState(const AttentionProblem& problem, Stream stream) {
  const Shape rows{problem.batch(), problem.seq_q(), problem.q_heads(), problem.value_dim()};
  const Shape statistics{problem.batch(), problem.q_heads(), problem.seq_q()};
  const Device device = problem.q.device;
  memory = Buffer(device, 4 * (rows.elements() + 2 * statistics.elements()), stream);
  auto* data = static_cast<float*>(memory.data());
  views.accumulator = TensorView(data, DType::f32, rows, device);
  data += rows.elements();
  views.row_max = TensorView(data, DType::f32, statistics, device);
  views.row_sum = TensorView(data + statistics.elements(), DType::f32, statistics, device);
}

void start_rows(const ForwardCall& local, const AttentionState& state,
                const ExecuteOptions& options) {
  ForwardCall call;
  call.problem = problem_without_keys(local.problem);
  call.state = state;
  call.stream = local.stream;
  attention_forward(call, options.backend);
}

std::unique_ptr<ForwardPass> make_forward_pass(const ForwardCall& local, const AttentionPlan& plan,
                                               const ExecuteOptions& options) {
  if (plan.request().block_rows > 0) return make_block_forward_pass(local, plan, options);
  return std::make_unique<StateForwardPass>(local, plan.q_layout().runs(plan.group()), options);
}

}  // namespace annulus
