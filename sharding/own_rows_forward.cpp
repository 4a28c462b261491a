#include "sharding/own_rows_forward.hpp"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "sharding/execution_accounting.hpp"
#include "sharding/stage_compute.hpp"
#include "sharding/waiting_kernel.hpp"

namespace annulus {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

std::int64_t bytes_of(const ConstTensorView& view) {
  return view.shape.elements() * size_bytes(view.dtype);
}

TensorView batch_row(const TensorView& view, std::int64_t b) { return view.slice(0, {b, b + 1}); }

// Memory of a tensor.
struct Rows {
  Buffer memory;
  TensorView view;

  Rows() = default;
  Rows(DType dtype, const Shape& shape, Stream stream)
      : memory(Device::cuda, shape.elements() * size_bytes(dtype), stream),
        view(memory.data(), dtype, shape, Device::cuda) {}
};

// Whether rows can be read, written and sent where they lie.
bool lies_well(const ConstTensorView& view) {
  const bool heads_follow = view.shape[2] == 1 || view.strides[2] == view.shape[3];
  return view.strides[3] == 1 && heads_follow && view.strides[0] % 8 == 0 &&
         view.strides[1] % 8 == 0 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
}

ConstTensorView contiguous(const ConstTensorView& view) {
  return {nullptr, view.dtype, view.shape, view.device};
}

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
        self_(plan.rank()),
        q_heads_(plan.q_heads_of(self_)),
        kv_heads_(plan.kv_heads_of(self_)) {
    for (ConstTensorView* view : {&local_.problem.q, &local_.problem.k, &local_.problem.v}) {
      if (lies_well(*view)) continue;
      moved_.emplace_back(view->dtype, view->shape, local.stream);
      copy(*view, moved_.back().view, local.stream);
      *view = moved_.back().view;
    }
    if (!lies_well(local.o)) {
      moved_.emplace_back(local.o.dtype, local.o.shape, local.stream);
      local_.o = moved_.back().view;
      caller_o_ = local.o;
    }
    for (const SequenceLayout::Chunk& chunk : q_layout_.chunks()) {
      if (chunk.rank == self_) continue;
      others_.push_back({chunk.rank, {other_rows_, chunk.global}});
      other_runs_.push_back(others_.back().run);
      other_rows_ += chunk.global.size();
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
    if (!kernel_first) {
      const ScopedTimer timer(accounting.exposed_seconds());
      bring_keys();
    }
    const std::int64_t middle = q_heads_.begin + (q_heads_.size() + 1) / 2;
    {
      const RecordedSpan span(options_.recorder, StageRecord::Kind::compute, 0);
      WaitingKernel kernel(ready);
      compute_own({q_heads_.begin, middle}, &ready);
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
      compute_own({middle, q_heads_.end}, nullptr);
    }
    const ScopedTimer timer(accounting.exposed_seconds());
    const RecordedSpan span(options_.recorder, StageRecord::Kind::exchange);
    finish();
  }

  std::int64_t buffer_bytes() const {
    std::int64_t bytes = q_.memory.bytes() + o_.memory.bytes() + lse_.memory.bytes();
    for (const std::vector<Rows>* rows : {&moved_, &k_, &v_, &arriving_o_, &arriving_lse_}) {
      for (const Rows& one : *rows) bytes += one.memory.bytes();
    }
    return bytes;
  }

 private:
  struct OtherRun {
    int rank;
    RowRun run;  // among the rows of all others, in global order
  };

  std::int64_t batch() const { return local_.problem.batch(); }
  const SequenceLayout& layout(bool queries) const { return queries ? q_layout_ : kv_layout_; }

  // The rows of a rank's shard that make up one message: all, where its runs end as messages do.
  std::vector<Span> messages(bool queries, int rank, std::int64_t row_bytes) const {
    constexpr std::int64_t kAlignment = 256;
    if (row_bytes % kAlignment == 0) return {{0, layout(queries).rows(rank)}};
    std::vector<Span> rows;
    for (const RowRun& run : layout(queries).runs(rank)) rows.push_back(run.rows());
    return rows;
  }

  void send_rows(bool queries, const ConstTensorView& local, int peer, Span heads,
                 std::vector<Send>& sends) const {
    const ConstTensorView view = local.slice(2, heads);
    const std::int64_t element = size_bytes(view.dtype);
    const std::int64_t row_bytes = heads.size() * view.shape[3] * element;
    for (std::int64_t b = 0; b < batch(); ++b) {
      for (const Span rows : messages(queries, self_, row_bytes)) {
        const std::int64_t offset = b * view.strides[0] + rows.begin * view.strides[1];
        sends.push_back({.peer = peer,
                         .data = static_cast<const std::byte*>(view.data) + offset * element,
                         .bytes = rows.size() * row_bytes,
                         .rows = std::max<std::int64_t>(rows.size(), 1),
                         .pitch = view.strides[1] * element});
      }
    }
  }

  // Keys and values of all ranks' rows for this rank's heads, its own where they lie; queries of
  // the others' rows.
  void start() {
    const AttentionProblem& problem = local_.problem;
    std::vector<Send> key_sends, query_sends;
    std::vector<Receive> key_receives, query_receives;
    k_.resize(index(heads_.size()));
    v_.resize(index(heads_.size()));
    for (int peer = 0; peer < heads_.size(); ++peer) {
      if (peer == self_) continue;
      const Span their_kv = plan_.kv_heads_of(peer);
      send_rows(false, problem.k, peer, their_kv, key_sends);
      send_rows(false, problem.v, peer, their_kv, key_sends);
      send_rows(true, problem.q, peer, plan_.q_heads_of(peer), query_sends);
      const std::int64_t rows = kv_layout_.rows(peer);
      k_[index(peer)] = Rows(problem.k.dtype, {batch(), rows, kv_heads_.size(), problem.head_dim()},
                             local_.stream);
      v_[index(peer)] = Rows(problem.v.dtype,
                             {batch(), rows, kv_heads_.size(), problem.value_dim()}, local_.stream);
      for (const TensorView& view : {k_[index(peer)].view, v_[index(peer)].view}) {
        receive_rows(view, peer, key_receives);
      }
    }
    q_ = Rows(problem.q.dtype, {batch(), other_rows_, q_heads_.size(), problem.head_dim()},
              local_.stream);
    const std::int64_t row_bytes = q_heads_.size() * problem.head_dim() * size_bytes(q_.view.dtype);
    for (std::int64_t b = 0; b < batch(); ++b) {
      for (const auto& [rank, run] : others_) {
        const TensorView rows = batch_row(q_.view, b).slice(1, run.rows());
        query_receives.push_back({rank, rows.data, run.global.size() * row_bytes});
      }
    }
    keys_ = heads_.exchange(key_sends, key_receives, local_.stream);
    queries_ = heads_.exchange(query_sends, query_receives, local_.stream);
  }

  void receive_rows(const TensorView& view, int peer, std::vector<Receive>& receives) const {
    const std::int64_t row_bytes = view.shape[2] * view.shape[3] * size_bytes(view.dtype);
    for (std::int64_t b = 0; b < batch(); ++b) {
      for (const Span rows : messages(false, peer, row_bytes)) {
        const TensorView part = batch_row(view, b).slice(1, rows);
        receives.push_back({peer, part.data, rows.size() * row_bytes});
      }
    }
  }

  // KV heads that `q_heads` read, and what they are to the kernel.
  Span kv_heads_for(Span q_heads) const {
    if (q_heads.empty()) return {kv_heads_.begin, kv_heads_.begin};
    const std::int64_t offset = plan_.request().q_head_offset;
    return {(q_heads.begin + offset) / plan_.group_size(),
            (q_heads.end - 1 + offset) / plan_.group_size() + 1};
  }
  HeadGroups groups_of(Span q_heads, Span kv_heads) const {
    return {plan_.group_size(),
            q_heads.begin + plan_.request().q_head_offset - kv_heads.begin * plan_.group_size()};
  }

  // Writes call.o and call.log_sum_exp. `ready`: the others' keys are waited for.
  void compute(ForwardCall call, Span q_heads, std::span<const RowRun> q_runs,
               const kernels::cuda::ReadyWords* ready) const {
    if (call.problem.q.shape.elements() == 0) return;
    const ScopedTimer timer(compute_seconds(options_));
    const Span kv = kv_heads_for(q_heads);
    call.problem.groups = groups_of(q_heads, kv);
    if (local_.problem.sinks) call.problem.sinks = local_.problem.sinks.slice(0, q_heads);
    call.problem.k = local_.problem.k.slice(2, kv);
    call.problem.v = local_.problem.v.slice(2, kv);
    std::vector<MaskSlices> slices;  // the segments refer to them
    slices.reserve(index(heads_.size()));
    std::vector<kernels::cuda::KvSegment> segments;
    const Span held{kv.begin - kv_heads_.begin, kv.end - kv_heads_.begin};
    for (int i = 0; i < heads_.size(); ++i) {
      const int rank = (self_ + i) % heads_.size();
      const std::span<const RowRun> runs = kv_layout_.runs(rank);
      const std::vector<RowRun> kv_runs(runs.begin(), runs.end());
      slices.push_back(localize(plan_.request().mask, q_runs, {&kv_runs, 1}));
      if (slices.back().slices.empty()) continue;
      kernels::cuda::KvSegment segment{call.problem.k, call.problem.v, slices.back().view()};
      if (rank != self_) {
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
    if (local_.log_sum_exp) call.log_sum_exp = local_.log_sum_exp.slice(1, q_heads);
    compute(call, q_heads, q_layout_.runs(self_), ready);
  }

  void compute_others() {
    const std::int64_t heads = q_heads_.size();
    ForwardCall call = local_;
    call.problem.q = q_.view;
    o_ = Rows(local_.o.dtype, {batch(), other_rows_, heads, local_.problem.value_dim()},
              local_.stream);
    call.o = o_.view;
    if (local_.log_sum_exp) {
      lse_ = Rows(DType::f32, {batch(), other_rows_, heads}, local_.stream);
      call.log_sum_exp = lse_.view.transposed(1, 2);
    }
    compute(call, q_heads_, other_runs_, nullptr);
  }

  void give_back() {
    std::vector<Send> sends;
    std::vector<Receive> receives;
    send_results(o_.view, sends);
    if (local_.log_sum_exp) send_results(lse_.view, sends);
    const std::int64_t rows = q_layout_.rows(self_);
    arriving_o_.resize(index(heads_.size()));
    arriving_lse_.resize(index(heads_.size()));
    for (int peer = 0; peer < heads_.size(); ++peer) {
      if (peer == self_) continue;
      const std::int64_t heads = plan_.q_heads_of(peer).size();
      Rows& o = arriving_o_[index(peer)];
      o = Rows(local_.o.dtype, {batch(), rows, heads, local_.problem.value_dim()}, local_.stream);
      receive_results(o.view, peer, receives);
      if (!local_.log_sum_exp) continue;
      Rows& lse = arriving_lse_[index(peer)];
      lse = Rows(DType::f32, {batch(), rows, heads}, local_.stream);
      receive_results(lse.view, peer, receives);
    }
    results_ = heads_.exchange(sends, receives, local_.stream);
  }

  // [batch, rows of all others, heads...]
  void send_results(const TensorView& results, std::vector<Send>& sends) const {
    std::vector<bool> sent(index(heads_.size()), false);
    for (std::int64_t b = 0; b < batch(); ++b) {
      for (const auto& [rank, run] : others_) {
        const TensorView rows = batch_row(results, b).slice(1, run.rows());
        sends.push_back({rank, rows.data, bytes_of(rows), sent[index(rank)]});
        sent[index(rank)] = true;
      }
    }
  }
  void receive_results(const TensorView& results, int peer, std::vector<Receive>& receives) const {
    bool received = false;
    for (std::int64_t b = 0; b < batch(); ++b) {
      for (const RowRun& run : q_layout_.runs(self_)) {
        const TensorView rows = batch_row(results, b).slice(1, run.rows());
        receives.push_back({peer, rows.data, bytes_of(rows), std::exchange(received, true)});
      }
    }
  }

  void finish() {
    results_->wait(local_.stream);
    for (int peer = 0; peer < heads_.size(); ++peer) {
      const Span heads = plan_.q_heads_of(peer);
      if (peer == self_ || heads.empty()) continue;
      copy(arriving_o_[index(peer)].view, local_.o.slice(2, heads), local_.stream);
      if (!local_.log_sum_exp) continue;
      copy(arriving_lse_[index(peer)].view.transposed(1, 2), local_.log_sum_exp.slice(1, heads),
           local_.stream);
    }
    if (caller_o_) copy(local_.o, caller_o_, local_.stream);
  }

  Communicator& heads_;
  const AttentionPlan& plan_;
  ForwardCall local_;
  const ExecuteOptions& options_;
  std::vector<Rows> moved_;         // the caller's tensors, where they lie badly
  TensorView caller_o_;             // then
  const SequenceLayout& q_layout_;  // of the ranks
  const SequenceLayout& kv_layout_;
  int self_;
  Span q_heads_;
  Span kv_heads_;
  std::vector<OtherRun> others_;
  std::vector<RowRun> other_runs_;
  std::int64_t other_rows_ = 0;
  std::vector<Rows> k_, v_;  // by rank
  Rows q_, o_, lse_;         // of the others' rows; LSE is [batch, rows, heads]
  std::vector<Rows> arriving_o_, arriving_lse_;
  std::unique_ptr<Exchange> keys_, queries_, results_;
};

}  // namespace

bool forward_own_rows_in_place(Communicator& heads, const AttentionPlan& plan,
                               const ForwardCall& local, const ExecuteOptions& options) {
  AttentionProblem problem = local.problem;  // the same on all ranks, but for rows
  problem.q = contiguous(problem.q);
  problem.k = contiguous(problem.k);
  problem.v = contiguous(problem.v);
  if (plan.groups() > 1 || heads.carrier() != Communicator::Carrier::copy_engine) return false;
  if (static_cast<std::size_t>(heads.size()) > kernels::cuda::kMaxSegments) return false;
  if (!may_compute_segments(plan, problem, options)) return false;
  ExecutionAccounting accounting(heads, options, local.problem, local.stream);
  OwnRowsForward forward(heads, plan, local, options);
  forward.run(accounting);
  accounting.close(forward.buffer_bytes());
  return true;
}

}  // namespace annulus
