#include "sharding/segment_forward.hpp"

#include <vector>

#include "kernels/cuda_support.hpp"
#include "sharding/execution_accounting.hpp"
#include "sharding/kv_feed.hpp"
#include "sharding/stage_compute.hpp"
#include "sharding/waiting_kernel.hpp"

namespace annulus {
namespace {

bool applies(const AttentionPlan& plan, const ForwardCall& local, const ExecuteOptions& options) {
  return local.problem.q.shape.elements() > 0 && may_compute_segments(plan, local.problem, options);
}

bool arrives_beside(const Communicator& ranks, const AttentionPlan& plan) {
  return ranks.carrier() == Communicator::Carrier::copy_engine && plan.stages().size() > 1 &&
         plan.stages().size() <= kernels::cuda::kMaxSegments;
}

/// The same on all ranks: sharing is collective.
bool lies_on_one_device(const Communicator& ranks, const ExecuteOptions& options) {
  return ranks.size() > 1 && ranks.reach() == Communicator::Reach::everybody && options.in_place &&
         static_cast<std::size_t>(ranks.size()) <= kernels::cuda::kMaxSegments;
}

/// Rows that others want lie in windows, where all read them: nothing arrives.
void forward_in_place(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                      const ExecuteOptions& options) {
  const AttentionProblem& problem = local.problem;
  ExecutionAccounting accounting(ranks, options, local.problem, local.stream);
  KvFeed feed = [&] {
    const ScopedTimer timer(accounting.exposed_seconds());
    return KvFeed(ranks, plan, problem.k, problem.v, options, local.stream);
  }();
  {
    const ScopedTimer timer(accounting.exposed_seconds());
    feed.take_turn();
  }
  std::vector<KvFeed::RowsInPlace> shards;  // the segments refer to their slices
  for (int i = 0; i < (feed.shares() ? plan.groups() : 1); ++i) {
    shards.push_back(feed.rows_in_place((plan.group() + i) % plan.groups()));
  }
  std::vector<kernels::cuda::KvSegment> segments;
  for (const KvFeed::RowsInPlace& shard : shards) {
    if (!shard.slices.slices.empty()) segments.push_back({shard.k, shard.v, shard.slices.view()});
  }
  {
    const ScopedTimer timer(compute_seconds(options));
    const RecordedSpan span(options.recorder, StageRecord::Kind::compute, 0, -1, feed.read_bytes());
    kernels::cuda::forward_segments(local, segments);
  }
  feed.end_turn(true);
  feed.close();
  accounting.add_bytes_in_place(feed.read_bytes());
  accounting.close(feed.buffer_bytes());
}

}  // namespace

bool forward_in_one_launch(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                           const ExecuteOptions& options) {
  if (!applies(plan, local, options)) return false;
  if (lies_on_one_device(ranks, options)) {
    forward_in_place(ranks, plan, local, options);
    return true;
  }
  if (!arrives_beside(ranks, plan)) return false;
  const AttentionProblem& problem = local.problem;
  const std::span<const Stage> stages = plan.stages();
  const int numbers = stages.back().number + 1;
  ExecutionAccounting accounting(ranks, options, local.problem, local.stream);
  const kernels::cuda::ReadyWords ready = kernels::cuda::next_ready_words();
  KvFeed feed(ranks, plan, problem.k, problem.v, options, local.stream, KvFeed::Reading::stages,
              numbers);
  {
    const ScopedTimer timer(accounting.exposed_seconds());
    for (const Stage& stage : stages) feed.start(stage);
  }
  std::vector<std::vector<StagePart>> parts;  // the segments refer to their slices
  std::vector<kernels::cuda::KvSegment> segments;
  for (std::size_t i = 0; i < stages.size(); ++i) {
    parts.push_back(forward_parts(stages[i], problem, plan, false));
    for (const StagePart& part : parts.back()) {
      const auto [k, v] = feed.views(stages[i], part);
      const std::uint32_t* word = stages[i].number == 0 ? nullptr : ready.words + i;
      segments.push_back({k, v, part.slices.view(), word, ready.value});
    }
  }
  const Stream side = kernels::cuda::side_stream();
  const auto bring_rows = [&] {
    for (std::size_t i = 0; i < stages.size(); ++i) {
      if (stages[i].number == 0) continue;
      feed.wait(stages[i], side);
      kernels::cuda::write_word(ready.words + i, ready.value, side);
    }
  };
  // The kernel begins with this rank's own keys while the host still waits for its peers. Where the
  // way of the rows is not known all copies are queued before it: it then waits for no host.
  const bool kernel_first = feed.may_follow_kernel();
  {
    const ScopedTimer timer(accounting.exposed_seconds());
    if (kernel_first) {
      feed.progress();  // what has been announced is under way before the launch
    } else {
      bring_rows();
    }
  }
  {
    // Ends behind the copies: what a stream holds between the kernel and them might hold them up.
    const RecordedSpan span(options.recorder, StageRecord::Kind::compute);  // all stages
    WaitingKernel kernel(ready);
    {
      const ScopedTimer timer(compute_seconds(options));
      kernels::cuda::forward_segments(local, segments);
    }
    if (kernel_first) bring_rows();
    kernel.has_all();
  }
  kernels::cuda::order(side, local.stream);  // the buffers end after both
  accounting.close(feed.buffer_bytes());
  return true;
}

}  // namespace annulus
