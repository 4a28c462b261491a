#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace annulus {

/// The ranks of one communicator, under an id that all of them compute alike: from their ranks in
/// the world and from how many groups of the same ranks came before.
class OperationGroup {
 public:
  explicit OperationGroup(std::vector<int> world_ranks);
  ~OperationGroup();
  OperationGroup(const OperationGroup&) = delete;
  OperationGroup& operator=(const OperationGroup&) = delete;

  std::uint64_t id() const { return id_; }
  int world_rank(int rank) const { return world_ranks_.at(static_cast<std::size_t>(rank)); }
  std::span<const int> world_ranks() const { return world_ranks_; }
  /// Numbers the collective steps of the group, from 1.
  std::int64_t next_number() { return ++steps_; }

 private:
  std::vector<int> world_ranks_;
  std::uint64_t id_ = 0;
  std::atomic<std::int64_t> steps_{0};
};

/// One step of this rank as it was, or is: what peers, reports and dumps show of it.
struct StepRecord {
  static constexpr int kPeers = 16;
  enum class State : std::int64_t { open, waiting, done, failed };

  std::int64_t number = 0;         // counts the steps of the rank from 1
  std::string_view name;           // "exchange", "all_gather"
  std::uint64_t group = 0;         // OperationGroup::id(); 0: none
  std::int64_t group_number = 0;   // of a collective step in its group; 0: between some ranks only
  int peers = 0;                   // how many ranks it is with besides this one
  std::array<int, kPeers> peer{};  // the first of them, world ranks; for collective steps all are
  std::int64_t bytes = 0;          // of this rank
  std::int64_t outstanding = 0;    // of them not yet known to have arrived
  std::int64_t begun_ns = 0;       // on the clock of now_ns()
  std::int64_t moved_ns = 0;       // the last time bytes arrived
  std::int64_t ended_ns = 0;       // 0: not yet
  State state = State::open;
};

/// "exchange with ranks 1, 2, 1024 of 2048 bytes outstanding" goes to people, in messages.
std::string_view name(StepRecord::State state);

/// The last steps of this process in a ring, with the one it waits for. Made for three readers that
/// must never wait: signal handlers, the watchdog's thread and a dump of a process that hangs.
class OperationLog {
 public:
  static constexpr int kKept = 256;

  std::int64_t begin(std::string_view literal_name, OperationGroup* group,
                     std::span<const int> peers, std::int64_t bytes) noexcept;
  void moved(std::int64_t number, std::int64_t bytes) noexcept;
  void end(std::int64_t number, bool failed) noexcept;

  /// The step that the program waits for. Async-signal-safe, as are the next three.
  std::optional<StepRecord> waiting() const noexcept;
  /// The newest step that began; absent before the first.
  std::optional<StepRecord> last() const noexcept;
  /// A step that the ring still has.
  std::optional<StepRecord> step(std::int64_t number) const noexcept;
  std::int64_t newest() const noexcept { return newest_.load(); }

  /// What the program is doing between its steps: "reading the input". Literals only.
  void enter_phase(const char* literal) noexcept { phase_.store(literal); }
  const char* phase() const noexcept { return phase_.load(); }

  /// The watchdog's thread runs now: pauses between two calls are times in which the whole process
  /// did not, such as after SIGSTOP.
  void note_running() noexcept;
  /// The pause that lasts, or the longest that ended less than a minute ago.
  std::int64_t paused_ns() const noexcept;
  /// The rank that the watchdog blames for the present wait; -1: none.
  void blame(int rank) noexcept { suspect_.store(rank); }
  int suspect() const noexcept { return suspect_.load(); }

  /// World ranks of a group that is alive; empty otherwise.
  std::vector<int> members(std::uint64_t group) const;

 private:
  friend class OperationGroup;
  friend class WaitForStep;

  struct Slot {
    std::atomic<std::int64_t> number{0};  // 0 while it is being written
    std::atomic<const char*> name{""};
    std::atomic<std::size_t> name_length{0};
    std::atomic<std::uint64_t> group{0};
    std::atomic<std::int64_t> group_number{0};
    std::atomic<int> peers{0};
    std::array<std::atomic<int>, StepRecord::kPeers> peer{};
    std::atomic<std::int64_t> bytes{0};
    std::atomic<std::int64_t> outstanding{0};
    std::atomic<std::int64_t> begun_ns{0};
    std::atomic<std::int64_t> moved_ns{0};
    std::atomic<std::int64_t> ended_ns{0};
    std::atomic<StepRecord::State> state{StepRecord::State::open};
  };

  Slot& slot(std::int64_t number) noexcept {
    return slots_[static_cast<std::size_t>(number) % kKept];
  }

  std::array<Slot, kKept> slots_;
  std::atomic<std::int64_t> newest_{0};
  std::atomic<std::int64_t> waiting_{0};
  std::atomic<const char*> phase_{"starting"};
  std::atomic<std::int64_t> running_ns_{0};  // the last sign of the watchdog's thread; 0: none
  std::atomic<std::int64_t> pause_ns_{0};
  std::atomic<std::int64_t> pause_end_ns_{0};
  std::atomic<int> suspect_{-1};
  mutable std::mutex groups_mutex_;
  std::map<std::uint64_t, std::vector<int>> groups_;    // by id
  std::map<std::uint64_t, std::int64_t> group_counts_;  // by hash of the ranks
};

/// The log of this process.
OperationLog& operation_log();

/// Nanoseconds of a steady clock.
std::int64_t now_ns() noexcept;

/// One step in the log of the process, from construction to destruction; an exception that passes
/// marks it as failed.
class LoggedStep {
 public:
  /// Between this rank and `peers`, ranks of the group. `literal_name` must live for ever.
  LoggedStep(std::string_view literal_name, OperationGroup& group, std::span<const int> peers,
             std::int64_t bytes);
  /// Of all ranks of the group.
  LoggedStep(std::string_view literal_name, OperationGroup& group, std::int64_t bytes);
  /// Of no group, such as the end of MPI.
  explicit LoggedStep(std::string_view literal_name);
  ~LoggedStep();
  LoggedStep(const LoggedStep&) = delete;
  LoggedStep& operator=(const LoggedStep&) = delete;

  /// Counts bytes that have arrived; this is progress to the watchdog.
  void moved(std::int64_t bytes) noexcept;
  std::int64_t number() const { return number_; }

 private:
  std::int64_t number_;
  int exceptions_;
};

/// While it lives this thread waits for a step: the watchdog's deadline runs.
class WaitForStep {
 public:
  explicit WaitForStep(const LoggedStep& step) noexcept;
  ~WaitForStep();
  WaitForStep(const WaitForStep&) = delete;
  WaitForStep& operator=(const WaitForStep&) = delete;

 private:
  std::int64_t before_;
};

/// A step that waits from the beginning to the end, as collective calls do.
class WaitingStep {
 public:
  WaitingStep(std::string_view literal_name, OperationGroup& group, std::int64_t bytes)
      : step_(literal_name, group, bytes), wait_(step_) {}

 private:
  LoggedStep step_;
  WaitForStep wait_;
};

}  // namespace annulus
