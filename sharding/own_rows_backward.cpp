#include "sharding/own_rows_backward.hpp"

#include <memory>
#include <vector>

#include "sharding/execution_accounting.hpp"
#include "sharding/own_rows.hpp"
#include "sharding/stage_compute.hpp"
#include "sharding/statistics_rows.hpp"

namespace annulus {
namespace {

// Gradients of rows that a peer computed.
struct Arriving {
  Span heads;
  TensorView into;
  DeviceTensor rows;
};

class OwnRowsBackward {
 public:
  OwnRowsBackward(Communicator& heads, const AttentionPlan& plan, const BackwardCall& local,
                  const ExecuteOptions& options)
      : heads_(heads),
        plan_(plan),
        local_(local),
        options_(options),
        q_layout_(plan.request().q_layout),
        kv_layout_(plan.request().kv_layout),
        rows_(plan) {
    local_.o = {};  // delta says as much, in fewer bytes
    for (ConstTensorView* view :
         {&local_.problem.q, &local_.problem.k, &local_.problem.v, &local_.grad_o}) {
      *view = lying_well(*view, local.stream, moved_);
    }
  }

  void run(ExecutionAccounting& accounting) {
    const Span heads = rows_.q_heads();
    const std::int64_t middle = heads.begin + (heads.size() + 1) / 2;
    {
      const ScopedTimer timer(accounting.exposed_seconds());
      const RecordedSpan span(options_.recorder, StageRecord::Kind::exchange, 0);
      start();
    }
    recorded(0, [&] { compute_own({heads.begin, middle}); });
    {
      const ScopedTimer timer(accounting.exposed_seconds());
      const RecordedSpan span(options_.recorder, StageRecord::Kind::wait, 1);
      arrive();
    }
    recorded(1, [&] { compute_others(); });
    give_back_queries();
    recorded(2, [&] { compute_other_keys(); });
    give_back_keys();
    recorded(3, [&] { compute_own({middle, heads.end}); });
    const ScopedTimer timer(accounting.exposed_seconds());
    const RecordedSpan span(options_.recorder, StageRecord::Kind::exchange);
    finish();
  }

  std::int64_t buffer_bytes() const {
    std::int64_t bytes = 0;
    for (const DeviceTensor& one : moved_) bytes += one.memory.bytes();
    for (const DeviceTensor* one : {&statistics_, &q_, &grad_o_, &other_statistics_, &lse_, &delta_,
                                    &k_, &v_, &grad_q_, &grad_k_, &grad_v_}) {
      bytes += one->memory.bytes();
    }
    for (const Arriving& arriving : arriving_) bytes += arriving.rows.memory.bytes();
    return bytes;
  }

 private:
  std::int64_t batch() const { return local_.problem.batch(); }
  // A rank without rows may pass null data.
  bool wants_queries() const { return local_.grad_q.rank() > 0; }

  template <typename Compute>
  void recorded(int stage, const Compute& compute) const {
    const RecordedSpan span(options_.recorder, StageRecord::Kind::compute, stage);
    compute();
  }

  DeviceTensor tensor(DType dtype, std::int64_t rows, std::int64_t heads, std::int64_t dim) const {
    return {dtype, {batch(), rows, heads, dim}, local_.stream};
  }

  // Keys and values of all rows for this rank's heads; queries, output gradients and statistics of
  // the others' rows.
  void start() {
    const AttentionProblem& problem = local_.problem;
    const DType dtype = problem.q.dtype;
    const std::int64_t q_heads = rows_.q_heads().size();
    statistics_ = tensor(DType::f32, problem.seq_q(), problem.q_heads(), 2);
    copy(as_rows(local_.log_sum_exp), statistics_.view.slice(3, {0, 1}), local_.stream);
    copy(as_rows(local_.delta), statistics_.view.slice(3, {1, 2}), local_.stream);
    std::vector<Send> sends;
    for (int peer = 0; peer < heads_.size(); ++peer) {
      if (peer == rows_.self()) continue;
      for (const ConstTensorView& keys : {problem.k, problem.v}) {
        rows_.send_heads(kv_layout_, keys, peer, plan_.kv_heads_of(peer), sends);
      }
      for (const ConstTensorView& queries :
           {problem.q, local_.grad_o, ConstTensorView(statistics_.view)}) {
        rows_.send_heads(q_layout_, queries, peer, plan_.q_heads_of(peer), sends);
      }
    }
    const std::int64_t others = rows_.other_rows();
    k_ = tensor(dtype, kv_layout_.seq(), rows_.kv_heads().size(), problem.head_dim());
    v_ = tensor(dtype, kv_layout_.seq(), rows_.kv_heads().size(), problem.value_dim());
    q_ = tensor(dtype, others, q_heads, problem.head_dim());
    grad_o_ = tensor(dtype, others, q_heads, problem.value_dim());
    other_statistics_ = tensor(DType::f32, others, q_heads, 2);
    std::vector<Receive> receives;
    OwnRows::receive_runs(k_.view, rows_.keys_of_others(), receives);
    OwnRows::receive_runs(v_.view, rows_.keys_of_others(), receives);
    OwnRows::receive_runs(q_.view, rows_.others(), receives);
    OwnRows::receive_runs(grad_o_.view, rows_.others(), receives);
    OwnRows::receive_runs(other_statistics_.view, rows_.others(), receives);
    rows_come_ = heads_.exchange(sends, receives, local_.stream);
  }

  void arrive() {
    rows_come_->wait(local_.stream);
    rows_.place_own_keys(local_.problem.k, k_.view, local_.stream);
    rows_.place_own_keys(local_.problem.v, v_.view, local_.stream);
    const Shape shape{batch(), rows_.q_heads().size(), rows_.other_rows()};
    lse_ = DeviceTensor(DType::f32, shape, local_.stream);
    delta_ = DeviceTensor(DType::f32, shape, local_.stream);
    copy(other_statistics_.view.slice(3, {0, 1}), as_rows(lse_.view), local_.stream);
    copy(other_statistics_.view.slice(3, {1, 2}), as_rows(delta_.view), local_.stream);
  }

  void compute(BackwardCall& call, Span q_heads, std::span<const RowRun> q_runs,
               std::span<const RowRun> kv_runs) const {
    if (call.problem.q.shape.elements() == 0 || call.problem.k.shape.elements() == 0) {
      if (call.overwrites_kv) clear(call.grad_k, local_.stream);
      if (call.overwrites_kv) clear(call.grad_v, local_.stream);
      return;
    }
    const ScopedTimer timer(compute_seconds(options_));
    const std::vector<RowRun> keys(kv_runs.begin(), kv_runs.end());
    const MaskSlices slices = localize(plan_.request().mask, q_runs, {&keys, 1});
    if (slices.slices.empty() && !call.overwrites_kv) return;
    call.problem.mask = slices.view();
    call.problem.groups = rows_.groups_of(q_heads, rows_.kv_heads_for(q_heads));
    if (local_.problem.sinks) call.problem.sinks = local_.problem.sinks.slice(0, q_heads);
    attention_backward(call, options_.backend);
  }

  // This rank's own query rows.
  BackwardCall own_queries(Span q_heads) const {
    BackwardCall call = local_;
    call.problem.q = local_.problem.q.slice(2, q_heads);
    call.grad_o = local_.grad_o.slice(2, q_heads);
    call.log_sum_exp = local_.log_sum_exp.slice(1, q_heads);
    call.delta = local_.delta.slice(1, q_heads);
    if (wants_queries()) call.grad_q = local_.grad_q.slice(2, q_heads);
    return call;
  }

  void compute_own(Span q_heads) const {
    const Span kv = rows_.kv_heads_for(q_heads);
    BackwardCall call = own_queries(q_heads);
    call.problem.k = local_.problem.k.slice(2, kv);
    call.problem.v = local_.problem.v.slice(2, kv);
    call.grad_k = local_.grad_k.slice(2, kv);
    call.grad_v = local_.grad_v.slice(2, kv);
    compute(call, q_heads, q_layout_.runs(rows_.self()), kv_layout_.runs(rows_.self()));
  }

  void read_all_keys(BackwardCall& call) const {
    call.problem.k = k_.view;
    call.problem.v = v_.view;
    call.grad_k = grad_k_.view;
    call.grad_v = grad_v_.view;
  }

  void compute_others() {
    const AttentionProblem& problem = local_.problem;
    const std::int64_t kv_heads = rows_.kv_heads().size();
    grad_k_ = tensor(DType::f32, kv_layout_.seq(), kv_heads, problem.head_dim());
    grad_v_ = tensor(DType::f32, kv_layout_.seq(), kv_heads, problem.value_dim());
    BackwardCall call = local_;
    call.problem.q = q_.view;
    call.grad_o = grad_o_.view;
    call.log_sum_exp = lse_.view;
    call.delta = delta_.view;
    if (wants_queries()) {
      grad_q_ = tensor(DType::f32, rows_.other_rows(), rows_.q_heads().size(), problem.head_dim());
      clear(grad_q_.view, local_.stream);
      call.grad_q = grad_q_.view;
    }
    read_all_keys(call);
    call.overwrites_kv = true;
    compute(call, rows_.q_heads(), rows_.other_runs(), rows_.all_keys());
  }

  void compute_other_keys() const {
    BackwardCall call = own_queries(rows_.q_heads());
    read_all_keys(call);
    compute(call, rows_.q_heads(), q_layout_.runs(rows_.self()), rows_.other_keys());
  }

  // Gradients of this rank's rows that `peer` computed for its heads come to rows of their own.
  void expect(const SequenceLayout& layout, int peer, Span heads, const TensorView& into,
              std::vector<Receive>& receives) {
    Arriving& arriving = arriving_.emplace_back();
    arriving.heads = heads;
    arriving.into = into;
    arriving.rows = tensor(DType::f32, layout.rows(rows_.self()), heads.size(), into.shape[3]);
    OwnRows::receive_runs(arriving.rows.view, runs_with(peer, layout, rows_.self()), receives);
  }

  void give_back_queries() {
    if (!wants_queries()) return;
    std::vector<Send> sends;
    std::vector<Receive> receives;
    OwnRows::send_runs(grad_q_.view, rows_.others(), sends);
    for (int peer = 0; peer < heads_.size(); ++peer) {
      if (peer == rows_.self()) continue;
      expect(q_layout_, peer, plan_.q_heads_of(peer), local_.grad_q, receives);
    }
    queries_return_ = heads_.exchange(sends, receives, local_.stream);
  }

  void give_back_keys() {
    std::vector<Send> sends;
    std::vector<Receive> receives;
    OwnRows::send_runs(grad_k_.view, rows_.keys_of_others(), sends);
    OwnRows::send_runs(grad_v_.view, rows_.keys_of_others(), sends);
    for (int peer = 0; peer < heads_.size(); ++peer) {
      if (peer == rows_.self()) continue;
      for (const TensorView& into : {local_.grad_k, local_.grad_v}) {
        expect(kv_layout_, peer, plan_.kv_heads_of(peer), into, receives);
      }
    }
    keys_return_ = heads_.exchange(sends, receives, local_.stream);
  }

  void finish() const {
    for (const RowRun& run : kv_layout_.runs(rows_.self())) {
      const auto own = [&](const TensorView& gradient) {
        return gradient.slice(1, run.rows()).slice(2, rows_.kv_heads());
      };
      accumulate(grad_k_.view.slice(1, run.global), own(local_.grad_k), local_.stream);
      accumulate(grad_v_.view.slice(1, run.global), own(local_.grad_v), local_.stream);
    }
    if (queries_return_ != nullptr) queries_return_->wait(local_.stream);
    keys_return_->wait(local_.stream);
    for (const Arriving& arriving : arriving_) {
      accumulate(arriving.rows.view, arriving.into.slice(2, arriving.heads), local_.stream);
    }
  }

  Communicator& heads_;
  const AttentionPlan& plan_;
  BackwardCall local_;
  const ExecuteOptions& options_;
  std::vector<DeviceTensor> moved_;  // the caller's tensors, where they lie badly
  const SequenceLayout& q_layout_;   // of the ranks
  const SequenceLayout& kv_layout_;
  OwnRows rows_;
  DeviceTensor statistics_;                     // LSE and delta of the own rows, all heads
  DeviceTensor q_, grad_o_, other_statistics_;  // of the others' rows
  DeviceTensor lse_, delta_;                    // the same as kernels read them
  DeviceTensor k_, v_, grad_k_, grad_v_;        // of all rows
  DeviceTensor grad_q_;                         // of the others' rows
  std::vector<Arriving> arriving_;
  std::unique_ptr<Exchange> rows_come_, queries_return_, keys_return_;
};

}  // namespace

bool backward_own_rows_in_place(Communicator& heads, const AttentionPlan& plan,
                                const BackwardCall& local, const ExecuteOptions& options) {
  if (!OwnRows::apply(heads, plan, local.problem, options)) return false;
  ExecutionAccounting accounting(heads, options, local.problem, local.stream);
  OwnRowsBackward backward(heads, plan, local, options);
  backward.run(accounting);
  accounting.close(backward.buffer_bytes());
  return true;
}

}  // namespace annulus
