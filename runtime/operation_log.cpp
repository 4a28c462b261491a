#include "runtime/operation_log.hpp"

#include <algorithm>
#include <ctime>
#include <exception>
#include <utility>

namespace annulus {
namespace {

constexpr std::int64_t kPauseKeptNs = 60'000'000'000;

std::uint64_t hash(std::span<const int> ranks) {
  std::uint64_t value = 0xcbf29ce484222325;  // FNV-1a, 64 bits, a rank at a time
  for (const int rank : ranks) {
    value = (value ^ static_cast<std::uint64_t>(rank)) * 0x100000001b3;
  }
  return value;
}

std::vector<int> world_ranks_of(const OperationGroup& group, std::span<const int> ranks) {
  std::vector<int> result;
  for (const int rank : ranks) {
    const int world_rank = group.world_rank(rank);
    if (std::find(result.begin(), result.end(), world_rank) == result.end()) {
      result.push_back(world_rank);
    }
  }
  return result;
}

}  // namespace

// clock_gettime and atomics without locks are all that the functions for signal handlers use.
static_assert(std::atomic<std::int64_t>::is_always_lock_free);
static_assert(std::atomic<const char*>::is_always_lock_free);

std::int64_t now_ns() noexcept {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<std::int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

std::string_view name(StepRecord::State state) {
  switch (state) {
    case StepRecord::State::open:
      return "open";
    case StepRecord::State::waiting:
      return "waiting";
    case StepRecord::State::done:
      return "done";
    case StepRecord::State::failed:
      return "failed";
  }
  return "?";
}

OperationLog& operation_log() {
  // Never destroyed: a signal or the watchdog may come while the program ends.
  static OperationLog& log = *new OperationLog;
  return log;
}

// ---- groups -------------------------------------------------------------------------------------

OperationGroup::OperationGroup(std::vector<int> world_ranks)
    : world_ranks_(std::move(world_ranks)) {
  OperationLog& log = operation_log();
  const std::lock_guard lock(log.groups_mutex_);
  const std::uint64_t ranks = hash(world_ranks_);
  id_ = ranks + static_cast<std::uint64_t>(log.group_counts_[ranks]++);
  log.groups_[id_] = world_ranks_;
}

OperationGroup::~OperationGroup() {
  OperationLog& log = operation_log();
  const std::lock_guard lock(log.groups_mutex_);
  log.groups_.erase(id_);
}

std::vector<int> OperationLog::members(std::uint64_t group) const {
  const std::lock_guard lock(groups_mutex_);
  const auto found = groups_.find(group);
  return found == groups_.end() ? std::vector<int>{} : found->second;
}

// ---- steps --------------------------------------------------------------------------------------

std::int64_t OperationLog::begin(std::string_view literal_name, OperationGroup* group,
                                 std::span<const int> peers, std::int64_t bytes) noexcept {
  const std::int64_t number = ++newest_;
  Slot& to = slot(number);
  to.number = 0;
  to.name = literal_name.data();
  to.name_length = literal_name.size();
  const bool collective = group != nullptr && peers.empty();
  to.group = group == nullptr ? 0 : group->id();
  to.group_number = collective ? group->next_number() : 0;
  to.peers = static_cast<int>(collective ? group->world_ranks().size() - 1 : peers.size());
  for (std::size_t i = 0; i < to.peer.size(); ++i) to.peer[i] = i < peers.size() ? peers[i] : -1;
  to.bytes = bytes;
  to.outstanding = bytes;
  const std::int64_t now = now_ns();
  to.begun_ns = now;
  to.moved_ns = now;
  to.ended_ns = 0;
  to.state = StepRecord::State::open;
  to.number = number;
  return number;
}

void OperationLog::moved(std::int64_t number, std::int64_t bytes) noexcept {
  Slot& at = slot(number);
  if (at.number != number) return;
  at.outstanding -= bytes;
  at.moved_ns = now_ns();
}

void OperationLog::end(std::int64_t number, bool failed) noexcept {
  Slot& at = slot(number);
  if (at.number != number) return;
  at.ended_ns = now_ns();
  if (!failed) at.outstanding = 0;
  at.state = failed ? StepRecord::State::failed : StepRecord::State::done;
}

std::optional<StepRecord> OperationLog::step(std::int64_t number) const noexcept {
  if (number <= 0) return std::nullopt;
  const Slot& from = slots_[static_cast<std::size_t>(number) % kKept];
  if (from.number != number) return std::nullopt;
  StepRecord record;
  record.number = number;
  record.name = std::string_view(from.name, from.name_length);
  record.group = from.group;
  record.group_number = from.group_number;
  record.peers = from.peers;
  for (std::size_t i = 0; i < record.peer.size(); ++i) record.peer[i] = from.peer[i];
  record.bytes = from.bytes;
  record.outstanding = from.outstanding;
  record.begun_ns = from.begun_ns;
  record.moved_ns = from.moved_ns;
  record.ended_ns = from.ended_ns;
  record.state = from.state;
  if (from.number != number) return std::nullopt;  // overwritten meanwhile
  if (waiting_ == number) record.state = StepRecord::State::waiting;
  return record;
}

std::optional<StepRecord> OperationLog::waiting() const noexcept { return step(waiting_); }

std::optional<StepRecord> OperationLog::last() const noexcept { return step(newest_); }

// ---- signs of life ------------------------------------------------------------------------------

void OperationLog::note_running() noexcept {
  const std::int64_t now = now_ns();
  const std::int64_t before = running_ns_.exchange(now);
  if (before == 0) return;
  const bool forgotten = now - pause_end_ns_ > kPauseKeptNs;
  if (!forgotten && now - before <= pause_ns_) return;
  pause_ns_ = now - before;
  pause_end_ns_ = now;
}

std::int64_t OperationLog::paused_ns() const noexcept {
  const std::int64_t now = now_ns();
  const std::int64_t before = running_ns_;
  const std::int64_t lasts = before == 0 ? 0 : now - before;
  return now - pause_end_ns_ > kPauseKeptNs ? lasts : std::max(lasts, pause_ns_.load());
}

LoggedStep::LoggedStep(std::string_view literal_name, OperationGroup& group,
                       std::span<const int> peers, std::int64_t bytes)
    : number_(operation_log().begin(literal_name, &group, world_ranks_of(group, peers), bytes)),
      exceptions_(std::uncaught_exceptions()) {}

LoggedStep::LoggedStep(std::string_view literal_name, OperationGroup& group, std::int64_t bytes)
    : number_(operation_log().begin(literal_name, &group, {}, bytes)),
      exceptions_(std::uncaught_exceptions()) {}

LoggedStep::LoggedStep(std::string_view literal_name)
    : number_(operation_log().begin(literal_name, nullptr, {}, 0)),
      exceptions_(std::uncaught_exceptions()) {}

LoggedStep::~LoggedStep() {
  operation_log().end(number_, std::uncaught_exceptions() > exceptions_);
}

void LoggedStep::moved(std::int64_t bytes) noexcept { operation_log().moved(number_, bytes); }

WaitForStep::WaitForStep(const LoggedStep& step) noexcept
    : before_(operation_log().waiting_.exchange(step.number())) {
  // The wait may begin long after the transfer: the deadline starts here.
  operation_log().moved(step.number(), 0);
}

WaitForStep::~WaitForStep() { operation_log().waiting_ = before_; }

}  // namespace annulus
