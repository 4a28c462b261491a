#include "sharding/own_rows_forward.hpp"

#include <memory>
#include <utility>
#include <vector>

#include "sharding/execution_accounting.hpp"
#include "sharding/own_rows.hpp"
#include "sharding/stage_compute.hpp"
#include "sharding/waiting_kernel.hpp"

namespace annulus {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

class OwnRowsForward {
 public:
  OwnRowsForward(Communicator& heads, const AttentionPlan& plan, const ForwardCall& local,
                 const ExecuteOptions& options)
      : heads_(heads),
        plan_(plan),
        local_(local),
        options_(options),
        q_layout_(plan.request().q_layout),
        kv_layout_(plan.request().kv_layout),
        rows_(plan) {
    for (ConstTensorView* view : {&local_.problem.q, &local_.problem.k, &local_.problem.v}) {
      *view = lying_well(*view, local.stream, moved_);
    }
    if (!lies_well(local.o)) {
      moved_.emplace_back(local.o.dtype, local.o.shape, local.stream);
      caller_o_ = std::exchange(local_.o, moved_.back().view);
    }
  }

  void run(ExecutionAccounting& accounting) {
    const kernels::cuda::ReadyWords ready = kernels::cuda::next_ready_words();
    {
      const ScopedTimer timer(accounting.exposed_seconds());
      start();
    }
    const Stream side = kernels::cuda::side_stream();
    const auto bring_keys = [&] {
      keys_->wait(side);
      kernels::cuda::write_word(ready.words, ready.value, side);
    };
    const bool kernel_first = keys_->may_follow_kernel();
    if (kernel_first) {
      keys_->test();  // what has been announced is under way before the launch
    } else {
      const ScopedTimer timer(accounting.exposed_seconds());
      bring_keys();
    }
    const Span heads = rows_.q_heads();
    const std::int64_t middle = heads.begin + (heads.size() + 1) / 2;
    {
      const RecordedSpan span(options_.recorder, StageRecord::Kind::compute, 0);
      WaitingKernel kernel(ready);
      compute_own({heads.begin, middle}, &ready);
      if (kernel_first) bring_keys();
      kernel.has_all();
    }
    {
      const RecordedSpan span(options_.recorder, StageRecord::Kind::wait, 1);
      keys_->wait(local_.stream);  // a rank without rows has not waited
      queries_->wait(local_.stream);
    }
    {
      const RecordedSpan span(options_.recorder, StageRecord::Kind::compute, 1);
      compute_others();
    }
    {
      const RecordedSpan span(options_.recorder, StageRecord::Kind::exchange, 1);
      give_back();
    }
    {
      const RecordedSpan span(options_.recorder, StageRecord::Kind::compute, 2);
      compute_own({middle, heads.end}, nullptr);
    }
    const ScopedTimer timer(accounting.exposed_seconds());
    const RecordedSpan span(options_.recorder, StageRecord::Kind::exchange);
    finish();
  }

  std::int64_t buffer_bytes() const {
    std::int64_t bytes = q_.memory.bytes() + o_.memory.bytes() + lse_.memory.bytes();
    for (const std::vector<DeviceTensor>* rows :
         {&moved_, &k_, &v_, &arriving_o_, &arriving_lse_}) {
      for (const DeviceTensor& one : *rows) bytes += one.memory.bytes();
    }
    return bytes;
  }

 private:
  std::int64_t batch() const { return local_.problem.batch(); }
  // A rank without rows may pass null data.
  bool wants_log_sum_exp() const { return local_.log_sum_exp.rank() > 0; }

  // Keys and values of all ranks' rows for this rank's heads, its own where they lie; queries of
  // the others' rows.
  void start() {
    const AttentionProblem& problem = local_.problem;
    std::vector<Send> key_sends, query_sends;
    std::vector<Receive> key_receives, query_receives;
    k_.resize(index(heads_.size()));
    v_.resize(index(heads_.size()));
    for (int peer = 0; peer < heads_.size(); ++peer) {
      if (peer == rows_.self()) continue;
      const Span their_kv = plan_.kv_heads_of(peer);
      rows_.send_heads(kv_layout_, problem.k, peer, their_kv, key_sends);
      rows_.send_heads(kv_layout_, problem.v, peer, their_kv, key_sends);
      rows_.send_heads(q_layout_, problem.q, peer, plan_.q_heads_of(peer), query_sends);
      const Shape kv{batch(), kv_layout_.rows(peer), rows_.kv_heads().size(), 0};
      k_[index(peer)] = of_dim(problem.k, kv, problem.head_dim());
      v_[index(peer)] = of_dim(problem.v, kv, problem.value_dim());
      const std::vector<RankRun> runs = runs_with(peer, kv_layout_, peer);
      OwnRows::receive_runs(k_[index(peer)].view, runs, key_receives);
      OwnRows::receive_runs(v_[index(peer)].view, runs, key_receives);
    }
    q_ = of_dim(problem.q, {batch(), rows_.other_rows(), rows_.q_heads().size(), 0},
                problem.head_dim());
    OwnRows::receive_runs(q_.view, rows_.others(), query_receives);
    keys_ = heads_.exchange(key_sends, key_receives, local_.stream);
    queries_ = heads_.exchange(query_sends, query_receives, local_.stream);
  }

  DeviceTensor of_dim(const ConstTensorView& like, Shape shape, std::int64_t dim) const {
    shape[3] = dim;
    return {like.dtype, shape, local_.stream};
  }

  // Writes call.o and call.log_sum_exp. `ready`: the others' keys are waited for.
  void compute(ForwardCall call, Span q_heads, std::span<const RowRun> q_runs,
               const kernels::cuda::ReadyWords* ready) const {
    if (call.problem.q.shape.elements() == 0) return;
    const ScopedTimer timer(compute_seconds(options_));
    const Span kv = rows_.kv_heads_for(q_heads);
    call.problem.groups = rows_.groups_of(q_heads, kv);
    if (local_.problem.sinks) call.problem.sinks = local_.problem.sinks.slice(0, q_heads);
    call.problem.k = local_.problem.k.slice(2, kv);
    call.problem.v = local_.problem.v.slice(2, kv);
    std::vector<MaskSlices> slices;  // the segments refer to them
    slices.reserve(index(heads_.size()));
    std::vector<kernels::cuda::KvSegment> segments;
    const std::int64_t first = rows_.kv_heads().begin;
    const Span held{kv.begin - first, kv.end - first};
    for (int i = 0; i < heads_.size(); ++i) {
      const int rank = (rows_.self() + i) % heads_.size();
      const std::span<const RowRun> runs = kv_layout_.runs(rank);
      const std::vector<RowRun> kv_runs(runs.begin(), runs.end());
      slices.push_back(localize(plan_.request().mask, q_runs, {&kv_runs, 1}));
      if (slices.back().slices.empty()) continue;
      kernels::cuda::KvSegment segment{call.problem.k, call.problem.v, slices.back().view()};
      if (rank != rows_.self()) {
        segment.k = k_[index(rank)].view.slice(2, held);
        segment.v = v_[index(rank)].view.slice(2, held);
        segment.ready = ready == nullptr ? nullptr : ready->words;
        segment.ready_value = ready == nullptr ? 0 : ready->value;
      }
      segments.push_back(segment);
    }
    kernels::cuda::forward_segments(call, segments);
  }

  void compute_own(Span q_heads, const kernels::cuda::ReadyWords* ready) const {
    ForwardCall call = local_;
    call.problem.q = local_.problem.q.slice(2, q_heads);
    call.o = local_.o.slice(2, q_heads);
    if (wants_log_sum_exp()) call.log_sum_exp = local_.log_sum_exp.slice(1, q_heads);
    compute(call, q_heads, q_layout_.runs(rows_.self()), ready);
  }

  void compute_others() {
    const std::int64_t heads = rows_.q_heads().size();
    ForwardCall call = local_;
    call.problem.q = q_.view;
    o_ = DeviceTensor(local_.o.dtype,
                      {batch(), rows_.other_rows(), heads, local_.problem.value_dim()},
                      local_.stream);
    call.o = o_.view;
    if (wants_log_sum_exp()) {
      lse_ = DeviceTensor(DType::f32, {batch(), rows_.other_rows(), heads}, local_.stream);
      call.log_sum_exp = lse_.view.transposed(1, 2);
    }
    compute(call, rows_.q_heads(), rows_.other_runs(), nullptr);
  }

  void give_back() {
    std::vector<Send> sends;
    std::vector<Receive> receives;
    OwnRows::send_runs(o_.view, rows_.others(), sends);
    if (wants_log_sum_exp()) OwnRows::send_runs(lse_.view, rows_.others(), sends);
    const std::int64_t rows = q_layout_.rows(rows_.self());
    arriving_o_.resize(index(heads_.size()));
    arriving_lse_.resize(index(heads_.size()));
    for (int peer = 0; peer < heads_.size(); ++peer) {
      if (peer == rows_.self()) continue;
      const std::int64_t heads = plan_.q_heads_of(peer).size();
      const std::vector<RankRun> runs = runs_with(peer, q_layout_, rows_.self());
      DeviceTensor& o = arriving_o_[index(peer)];
      o = of_dim(local_.o, {batch(), rows, heads, 0}, local_.problem.value_dim());
      OwnRows::receive_runs(o.view, runs, receives);
      if (!wants_log_sum_exp()) continue;
      DeviceTensor& lse = arriving_lse_[index(peer)];
      lse = DeviceTensor(DType::f32, {batch(), rows, heads}, local_.stream);
      OwnRows::receive_runs(lse.view, runs, receives);
    }
    results_ = heads_.exchange(sends, receives, local_.stream);
  }

  void finish() {
    results_->wait(local_.stream);
    for (int peer = 0; peer < heads_.size(); ++peer) {
      const Span heads = plan_.q_heads_of(peer);
      if (peer == rows_.self() || heads.empty()) continue;
      copy(arriving_o_[index(peer)].view, local_.o.slice(2, heads), local_.stream);
      if (!wants_log_sum_exp()) continue;
      copy(arriving_lse_[index(peer)].view.transposed(1, 2), local_.log_sum_exp.slice(1, heads),
           local_.stream);
    }
    if (caller_o_) copy(local_.o, caller_o_, local_.stream);
  }

  Communicator& heads_;
  const AttentionPlan& plan_;
  ForwardCall local_;
  const ExecuteOptions& options_;
  std::vector<DeviceTensor> moved_;  // the caller's tensors, where they lie badly
  TensorView caller_o_;              // then
  const SequenceLayout& q_layout_;   // of the ranks
  const SequenceLayout& kv_layout_;
  OwnRows rows_;
  std::vector<DeviceTensor> k_, v_;  // by rank
  DeviceTensor q_, o_, lse_;         // of the others' rows; LSE is [batch, rows, heads]
  std::vector<DeviceTensor> arriving_o_, arriving_lse_;
  std::unique_ptr<Exchange> keys_, queries_, results_;
};

}  // namespace

bool forward_own_rows_in_place(Communicator& heads, const AttentionPlan& plan,
                               const ForwardCall& local, const ExecuteOptions& options) {
  if (!OwnRows::apply(heads, plan, local.problem, options)) return false;
  ExecutionAccounting accounting(heads, options, local.problem, local.stream);
  OwnRowsForward forward(heads, plan, local, options);
  forward.run(accounting);
  accounting.close(forward.buffer_bytes());
  return true;
}

}  // namespace annulus
