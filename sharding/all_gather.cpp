#include "sharding/all_gather.hpp"

#include <algorithm>
#include <memory>

#include "sharding/backward_pass.hpp"
#include "sharding/execution_accounting.hpp"
#include "sharding/gradient_return.hpp"
#include "sharding/kv_feed.hpp"
#include "sharding/stage_compute.hpp"

namespace annulus {
namespace {

// Query heads that a KV head serves.
Span q_heads_of(const AttentionProblem& problem, std::int64_t kv_head, std::int64_t group_size) {
  const std::int64_t begin = kv_head * group_size - problem.groups.q_head_offset;
  return intersect({0, problem.q_heads()}, {begin, begin + group_size});
}

AttentionProblem problem_of_head(const AttentionProblem& local, const AttentionPlan& plan,
                                 std::int64_t kv_head) {
  const Span q_heads = q_heads_of(local, kv_head, plan.group_size());
  // One KV head: every query head of the call reads it.
  const HeadGroups groups{std::max<std::int64_t>(plan.group_size(), 1), 0};
  return with_heads(local, q_heads, {kv_head, kv_head + 1}, groups);
}

ForwardCall call_of_head(const ForwardCall& local, const AttentionPlan& plan,
                         std::int64_t kv_head) {
  const Span q_heads = q_heads_of(local.problem, kv_head, plan.group_size());
  ForwardCall call = local;
  call.problem = problem_of_head(local.problem, plan, kv_head);
  call.o = local.o.slice(2, q_heads);
  if (local.log_sum_exp) call.log_sum_exp = local.log_sum_exp.slice(1, q_heads);
  return call;
}

BackwardCall call_of_head(const BackwardCall& local, const AttentionPlan& plan,
                          std::int64_t kv_head) {
  const Span q_heads = q_heads_of(local.problem, kv_head, plan.group_size());
  BackwardCall call = local;
  call.problem = problem_of_head(local.problem, plan, kv_head);
  call.grad_o = local.grad_o.slice(2, q_heads);
  call.log_sum_exp = local.log_sum_exp.slice(1, q_heads);
  call.delta = local.delta.slice(1, q_heads);
  if (local.o) call.o = local.o.slice(2, q_heads);
  if (local.grad_q) call.grad_q = local.grad_q.slice(2, q_heads);
  call.grad_k = local.grad_k.slice(2, {kv_head, kv_head + 1});
  call.grad_v = local.grad_v.slice(2, {kv_head, kv_head + 1});
  if (local.grad_bias && local.grad_bias.shape[1] > 1) {
    call.grad_bias = local.grad_bias.slice(1, q_heads);
  }
  return call;
}

ExecuteOptions by_messages(const ExecuteOptions& options) {
  ExecuteOptions changed = options;
  changed.in_place = false;
  return changed;
}

// Feeds of consecutive KV heads: the next one's rows travel while this one's are used.
class HeadFeeds {
 public:
  HeadFeeds(Communicator& ranks, const AttentionPlan& plan, const AttentionProblem& problem,
            const ExecuteOptions& options, Stream stream)
      : ranks_(ranks),
        plan_(plan),
        problem_(problem),
        options_(by_messages(options)),
        stream_(stream),
        stage_(plan.stages().empty() ? nullptr : &plan.stages().front()) {
    prefetch(0);
  }

  const Stage* stage() const { return stage_; }

  /// The feed of `kv_head`, there; the head after it has started.
  KvFeed& at(std::int64_t kv_head) {
    current_ = std::move(next_);
    prefetch(kv_head + 1);
    if (stage_ != nullptr) current_->wait(*stage_);
    held_ = std::max(held_, current_->buffer_bytes() + (next_ ? next_->buffer_bytes() : 0));
    return *current_;
  }
  void progress() {
    if (next_ != nullptr) next_->progress();
  }
  std::int64_t buffer_bytes() const { return held_; }

 private:
  void prefetch(std::int64_t kv_head) {
    if (kv_head >= problem_.kv_heads()) return;
    const Span head{kv_head, kv_head + 1};
    next_ = std::make_unique<KvFeed>(ranks_, plan_, problem_.k.slice(2, head),
                                     problem_.v.slice(2, head), options_, stream_);
    if (stage_ != nullptr) next_->start(*stage_);
  }

  Communicator& ranks_;
  const AttentionPlan& plan_;
  const AttentionProblem& problem_;
  ExecuteOptions options_;
  Stream stream_;
  const Stage* stage_;
  std::unique_ptr<KvFeed> current_;
  std::unique_ptr<KvFeed> next_;
  std::int64_t held_ = 0;
};

}  // namespace

void all_gather_forward(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                        const ExecuteOptions& options) {
  ExecutionAccounting accounting(ranks, options, local.problem, local.stream);
  HeadFeeds feeds(ranks, plan, local.problem, options, local.stream);
  std::int64_t state_bytes = 0;
  for (std::int64_t head = 0; head < local.problem.kv_heads(); ++head) {
    const ForwardCall call = call_of_head(local, plan, head);
    const std::unique_ptr<ForwardPass> pass = make_forward_pass(call, plan, options);
    const KvFeed& feed = [&]() -> KvFeed& {
      const ScopedTimer timer(accounting.exposed_seconds());
      const RecordedSpan span(options.recorder, StageRecord::Kind::wait, static_cast<int>(head));
      return feeds.at(head);
    }();
    const RecordedSpan span(options.recorder, StageRecord::Kind::compute, static_cast<int>(head));
    if (feeds.stage() != nullptr) {
      const std::vector<StagePart> parts = forward_parts(*feeds.stage(), call.problem, plan, false);
      for (const StagePart& part : parts) {
        const auto [k, v] = feed.views(*feeds.stage(), part);
        pass->add(part, k, v, &part == &parts.back());
        feeds.progress();
      }
    }
    pass->finish();
    state_bytes = std::max(state_bytes, pass->buffer_bytes());
  }
  accounting.close(feeds.buffer_bytes() + state_bytes);
}

void all_gather_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                         const ExecuteOptions& options) {
  ExecutionAccounting accounting(ranks, options, local.problem, local.stream);
  HeadFeeds feeds(ranks, plan, local.problem, options, local.stream);
  const Stage* stage = feeds.stage();
  const bool returns = stage != nullptr && stage->number > 0;
  std::unique_ptr<GradientReturn> before;
  std::int64_t return_bytes = 0;
  std::int64_t pass_bytes = 0;
  for (std::int64_t head = 0; head < local.problem.kv_heads(); ++head) {
    const BackwardCall call = call_of_head(local, plan, head);
    const std::unique_ptr<BackwardPass> pass = make_backward_pass(call, plan, options);
    const KvFeed& feed = [&]() -> KvFeed& {
      const ScopedTimer timer(accounting.exposed_seconds());
      const RecordedSpan span(options.recorder, StageRecord::Kind::wait, static_cast<int>(head));
      return feeds.at(head);
    }();
    if (stage == nullptr) continue;
    auto back = std::make_unique<GradientReturn>(ranks, plan, call, false);
    back->prepare(*stage);
    {
      const RecordedSpan span(options.recorder, StageRecord::Kind::compute, static_cast<int>(head));
      for (const StagePart& part : backward_parts(*stage, call.problem, plan, false)) {
        const auto [k, v] = feed.views(*stage, part);
        pass->add(*stage, part, k, v, *back);
        feeds.progress();
      }
    }
    pass_bytes = std::max(pass_bytes, pass->buffer_bytes());
    if (!returns) {
      return_bytes = std::max(return_bytes, back->buffer_bytes());
      continue;
    }
    const ScopedTimer timer(accounting.exposed_seconds());
    const RecordedSpan span(options.recorder, StageRecord::Kind::reduction,
                            static_cast<int>(head) - 1);
    if (before != nullptr) before->finish(*stage);
    const std::int64_t behind = before ? before->buffer_bytes() : 0;
    return_bytes = std::max(return_bytes, back->buffer_bytes() + behind);
    before = std::move(back);
    before->start(*stage);
    return_bytes = std::max(return_bytes, before->buffer_bytes());
  }
  if (before != nullptr) {
    before->finish(*stage);
    return_bytes = std::max(return_bytes, before->buffer_bytes());
  }
  accounting.close(feeds.buffer_bytes() + return_bytes + pass_bytes);
}

}  // namespace annulus
