#include "sharding/joint_backward.hpp"

#include <algorithm>
#include <functional>

#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "sharding/stage_compute.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kFloatBytes = 4;

/// fp32 dK and dV of all ranks, in windows as far apart in rows as those of their keys.
class SharedGradients {
 public:
  SharedGradients(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                  std::int64_t rows_apart)
      // Of their own: what a tile reads past the rows of keys must have been keys.
      : group_(ranks.part("gradients", 0, ranks.rank())),
        grad_k_(local.grad_k),
        grad_v_(local.grad_v),
        stream_(local.stream),
        max_rows_(plan.kv_layout().max_rows()) {
    const std::int64_t row_bytes = grad_k_.shape[2] * grad_k_.shape[3] * kFloatBytes;
    window_ = group_.expose(rows_apart * row_bytes, row_bytes);
    require(window_->stride() == rows_apart * row_bytes, ExitCode::internal,
            "ring: gradients lie {} bytes apart for {} rows of {}", window_->stride(), rows_apart,
            row_bytes);
  }

  /// Clears this rank's; then all may add.
  void open() {
    window_->begin_writes(stream_);
    const KvViews mine = views(window_->local());
    clear(mine.k, stream_);
    clear(mine.v, stream_);
    window_->fence(stream_);
  }

  /// The rows of all ranks, as KvFeed::joined_views() has their keys.
  KvViews of_all(std::int64_t rows) const {
    const void* first = window_->local();
    for (int peer = 0; peer < group_.size(); ++peer) {
      first = std::min(first, window_->peer(peer), std::less<>());
    }
    KvViews all = views(const_cast<void*>(first));
    all.k.shape[1] = all.v.shape[1] = rows;
    return all;
  }

  /// When all have added: takes what this rank's rows got.
  void close() {
    window_->fence(stream_);
    const KvViews mine = views(window_->local());
    const Span rows{0, grad_k_.shape[1]};
    accumulate(mine.k.slice(1, rows), grad_k_, stream_);
    accumulate(mine.v.slice(1, rows), grad_v_, stream_);
    window_->end_reads(stream_);
  }

  std::int64_t buffer_bytes() const { return kv_bytes(grad_k_.shape, grad_v_.shape, DType::f32); }

 private:
  KvViews views(void* memory) const {
    Shape k = grad_k_.shape;
    Shape v = grad_v_.shape;
    k[1] = v[1] = max_rows_;
    return kv_views(memory, k, v, DType::f32, grad_k_.device);
  }

  Communicator& group_;
  TensorView grad_k_;
  TensorView grad_v_;
  Stream stream_;
  std::int64_t max_rows_;
  std::unique_ptr<Window> window_;
};

void add_to_all(const AttentionPlan& plan, const BackwardCall& local, const ExecuteOptions& options,
                const KvFeed& feed, const KvViews& gradients) {
  const StagePart& part = *feed.joined();
  if (part.slices.slices.empty() || local.problem.q.shape.elements() == 0) return;
  const ScopedTimer timer(compute_seconds(options));
  const auto [k, v] = feed.joined_views();
  const std::vector<PositionRun> q_positions = positions_of(plan.q_layout().runs(plan.group()));
  BackwardCall call = local;
  call.problem = problem_of_part(local.problem, part, k, v, q_positions);
  call.grad_k = gradients.k;
  call.grad_v = gradients.v;
  attention_backward(call, options.backend);
}

}  // namespace

bool may_join_backward(const Communicator& ranks, const AttentionPlan& plan,
                       const BackwardCall& local, const ExecuteOptions& options) {
  return ranks.size() > 1 && ranks.reach() == Communicator::Reach::everybody && options.in_place &&
         plan.request().block_rows == 0 && !local.deterministic && local.grad_k && local.grad_v &&
         kernels::cuda::takes_segments(local.problem, options.backend);
}

void joint_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                    const ExecuteOptions& options, KvFeed& feed, ExecutionAccounting& accounting) {
  SharedGradients gradients(ranks, plan, local, feed.rows_apart());
  {
    const ScopedTimer timer(accounting.exposed_seconds());
    gradients.open();
    feed.take_turn();
  }
  {
    const RecordedSpan span(options.recorder, StageRecord::Kind::compute, 0, -1, feed.read_bytes());
    add_to_all(plan, local, options, feed, gradients.of_all(feed.joined()->rows.end));
  }
  const ScopedTimer timer(accounting.exposed_seconds());
  const RecordedSpan span(options.recorder, StageRecord::Kind::reduction);
  feed.end_turn(true);
  feed.close();
  gradients.close();
  const std::int64_t added = feed.read_bytes() / size_bytes(local.problem.k.dtype) * kFloatBytes;
  accounting.add_bytes_in_place(feed.read_bytes() + added);
  accounting.close(feed.buffer_bytes() + gradients.buffer_bytes());
}

}  // namespace annulus
