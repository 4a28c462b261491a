#include "sharding/segment_forward.hpp"

#include <vector>

#include "kernels/cuda_support.hpp"
#include "sharding/execution_accounting.hpp"
#include "sharding/kv_feed.hpp"
#include "sharding/stage_compute.hpp"

namespace annulus {
namespace {

/// Whether the kernel call of every stage is one with the same queries.
bool is_uniform(const AttentionProblem& problem, const AttentionPlan& plan) {
  return !problem.bias && !problem.dense_mask && problem.dropout.probability == 0.0F &&
         plan.request().block_rows == 0;
}

bool applies(const Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
             const ExecuteOptions& options) {
  const AttentionProblem& problem = local.problem;
  return options.one_launch && ranks.carrier() == Communicator::Carrier::copy_engine &&
         problem.q.device == Device::cuda && problem.q.shape.elements() > 0 &&
         plan.stages().size() > 1 && plan.stages().size() <= kernels::cuda::kMaxSegments &&
         is_uniform(problem, plan) && kernels::cuda::takes_segments(problem, options.backend);
}

}  // namespace

bool forward_in_one_launch(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                           const ExecuteOptions& options) {
  if (!applies(ranks, plan, local, options)) return false;
  const AttentionProblem& problem = local.problem;
  const std::span<const Stage> stages = plan.stages();
  const int numbers = stages.back().number + 1;
  ExecutionAccounting accounting(ranks, options, local.problem, local.stream);
  const kernels::cuda::ReadyWords ready = kernels::cuda::next_ready_words();
  KvFeed feed(ranks, plan, problem.k, problem.v, options, local.stream, KvFeed::Reading::stages,
              numbers);
  const Stream side = kernels::cuda::side_stream();
  kernels::cuda::order(local.stream, side);
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
  {
    // All copies are queued before the kernel is: it waits for no host, and no stream of theirs for
    // it, whatever streams share of the device's queues.
    const ScopedTimer timer(accounting.exposed_seconds());
    for (std::size_t i = 0; i < stages.size(); ++i) {
      if (stages[i].number == 0) continue;
      feed.wait(stages[i], side);
      kernels::cuda::write_word(ready.words + i, ready.value, side);
    }
  }
  {
    const ScopedTimer timer(compute_seconds(options));
    const RecordedSpan span(options.recorder, StageRecord::Kind::compute);  // all stages
    kernels::cuda::forward_segments(local, segments);
  }
  kernels::cuda::order(side, local.stream);  // the buffers end after both
  accounting.close(feed.buffer_bytes());
  return true;
}

}  // namespace annulus
