#include "sharding/ring.hpp"

#include <algorithm>
#include <memory>

#include "sharding/backward_pass.hpp"
#include "sharding/execution_accounting.hpp"
#include "sharding/gradient_return.hpp"
#include "sharding/joint_backward.hpp"
#include "sharding/kv_feed.hpp"
#include "sharding/segment_forward.hpp"
#include "sharding/stage_compute.hpp"

namespace annulus {
namespace {

// The stages of a plan by number. Ranks without work in a stage go through its number all the same:
// messages between two ranks are matched by the order in which both post them.
class Schedule {
 public:
  explicit Schedule(const AttentionPlan& plan) : plan_(plan) {
    for (const Stage& stage : plan.stages()) {
      stages_.resize(static_cast<std::size_t>(stage.number) + 1, nullptr);
      stages_.back() = &stage;
    }
  }
  int count() const { return static_cast<int>(stages_.size()); }
  const Stage* at(int number) const {
    return 0 <= number && number < count() ? stages_[static_cast<std::size_t>(number)] : nullptr;
  }
  /// The last stage that computes anything; -1: none does.
  int last_with_work() const {
    int last = -1;
    for (const Stage& stage : plan_.stages()) {
      if (!stage.slices.slices.empty()) last = stage.number;
    }
    return last;
  }

 private:
  const AttentionPlan& plan_;
  std::vector<const Stage*> stages_;
};

// The only rank that a stage's rows come from; -1: several, or none.
int peer_of(const Stage& stage) {
  return stage.receives.size() == 1 ? stage.receives.front().peer : -1;
}

}  // namespace

void ring_forward(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                  const ExecuteOptions& options) {
  if (forward_in_one_launch(ranks, plan, local, options)) return;
  ExecutionAccounting accounting(ranks, options, local.problem, local.stream);
  const Schedule schedule(plan);
  const AttentionProblem& problem = local.problem;
  KvFeed feed = [&] {
    const ScopedTimer timer(accounting.exposed_seconds());
    // Bias and masks lie by stages; on devices all rows at once are forward_in_one_launch()'s.
    const bool by_stages = problem.bias || problem.dense_mask || ranks.device() == Device::cuda;
    return KvFeed(ranks, plan, problem.k, problem.v, options, local.stream,
                  by_stages ? KvFeed::Reading::stages : KvFeed::Reading::joined);
  }();
  feed.take_turn();
  const std::unique_ptr<ForwardPass> pass = make_forward_pass(local, plan, options);
  if (feed.joined()) {
    const RecordedSpan span(options.recorder, StageRecord::Kind::compute, 0, -1, feed.read_bytes());
    const auto [k, v] = feed.joined_views();
    if (!feed.joined()->slices.slices.empty()) pass->add(*feed.joined(), k, v, true);
  }
  const int last = schedule.last_with_work();
  for (int number = 0; number < schedule.count() && !feed.joined(); ++number) {
    {
      const ScopedTimer timer(accounting.exposed_seconds());
      const RecordedSpan span(options.recorder, StageRecord::Kind::wait, number);
      if (schedule.at(number + 1) != nullptr) feed.start(*schedule.at(number + 1));
      if (schedule.at(number) != nullptr) feed.wait(*schedule.at(number));
    }
    if (schedule.at(number) == nullptr) continue;
    const Stage& stage = *schedule.at(number);
    const RecordedSpan span(options.recorder, StageRecord::Kind::compute, number, peer_of(stage),
                            feed.read_bytes(stage));
    const std::vector<StagePart> parts = forward_parts(stage, problem, plan, feed.in_place(stage));
    for (const StagePart& part : parts) {
      const auto [k, v] = feed.views(stage, part);
      pass->add(part, k, v, number == last && &part == &parts.back());
      feed.progress();
    }
  }
  pass->finish();
  feed.end_turn(true);
  feed.close();
  accounting.add_bytes_in_place(feed.read_bytes());
  accounting.close(feed.buffer_bytes() + pass->buffer_bytes());
}

void ring_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                   const ExecuteOptions& options) {
  ExecutionAccounting accounting(ranks, options, local.problem, local.stream);
  const Schedule schedule(plan);
  const AttentionProblem& problem = local.problem;
  KvFeed feed = [&] {
    const ScopedTimer timer(accounting.exposed_seconds());
    return KvFeed(ranks, plan, problem.k, problem.v, options, local.stream,
                  may_join_backward(ranks, plan, local, options) ? KvFeed::Reading::together
                                                                 : KvFeed::Reading::stages);
  }();
  if (feed.joined()) return joint_backward(ranks, plan, local, options, feed, accounting);
  GradientReturn back = [&] {
    const ScopedTimer timer(accounting.exposed_seconds());
    return GradientReturn(ranks, plan, local, feed.shares() && ranks.device() == Device::cpu);
  }();
  const std::unique_ptr<BackwardPass> pass = make_backward_pass(local, plan, options);
  const int numbers = std::max(schedule.count() + 1, feed.most_stages());
  for (int number = 0; number < numbers; ++number) {
    const Stage* stage = schedule.at(number);
    {
      const ScopedTimer timer(accounting.exposed_seconds());
      const RecordedSpan span(options.recorder, StageRecord::Kind::wait, number);
      if (number < feed.most_stages()) feed.take_turn();
      if (schedule.at(number + 1) != nullptr) feed.start(*schedule.at(number + 1));
      if (stage != nullptr) feed.wait(*stage);
    }
    if (stage != nullptr) {
      const ScopedTimer timer(accounting.exposed_seconds());
      back.prepare(*stage);
    }
    if (stage != nullptr) {
      const RecordedSpan span(options.recorder, StageRecord::Kind::compute, number, peer_of(*stage),
                              feed.read_bytes(*stage));
      for (const StagePart& part : backward_parts(*stage, problem, plan, feed.in_place(*stage))) {
        const auto [k, v] = feed.views(*stage, part);
        pass->add(*stage, part, k, v, back);
        feed.progress();
        back.progress();
      }
    }
    const ScopedTimer timer(accounting.exposed_seconds());
    const RecordedSpan span(options.recorder, StageRecord::Kind::reduction, number - 1);
    if (schedule.at(number - 1) != nullptr && number > 1) back.finish(*schedule.at(number - 1));
    if (stage != nullptr && number > 0) back.start(*stage);
    if (number < feed.most_stages()) feed.end_turn(number + 1 == feed.most_stages());
  }
  {
    const ScopedTimer timer(accounting.exposed_seconds());
    back.close();
  }
  feed.close();
  accounting.add_bytes_in_place(feed.read_bytes() + back.read_bytes());
  accounting.close(feed.buffer_bytes() + back.buffer_bytes() + pass->buffer_bytes());
}

}  // namespace annulus
