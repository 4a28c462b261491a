#include "runtime/watchdog.hpp"

#include <fcntl.h>
#include <mpi.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <list>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/checked_gather.hpp"
#include "runtime/flight_recorder.hpp"
#include "runtime/mpi_check.hpp"
#include "runtime/operation_log.hpp"
#include "runtime/signals.hpp"
#include "runtime/watched_peers.hpp"

namespace annulus {
namespace {

constexpr int kQuestionTag = 1;
constexpr int kAnswerTag = 2;
constexpr int kDumpTag = 3;
constexpr int kExitPeer = static_cast<int>(ExitCode::peer);
constexpr unsigned kAbortPatienceSeconds = 4;
constexpr std::int64_t kLongestTickNs = 250'000'000;
constexpr std::int64_t kShortestTickNs = 5'000'000;

template <std::size_t Size>
void copy_text(std::string_view from, std::array<char, Size>& to) {
  const std::size_t length = std::min(from.size(), Size - 1);
  std::memcpy(to.data(), from.data(), length);
  to[length] = '\0';
}

std::int64_t processor_ns(int who) {
  rusage usage{};
  getrusage(who, &usage);
  return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1'000'000'000 +
         (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1'000;
}

/// Bytes read and written so far, 0 where /proc does not tell: a slow disk uses little processor.
std::int64_t moved_by_files() {
  std::array<char, 512> text{};
  const int file = open("/proc/self/io", O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  const ssize_t count = read(file, text.data(), text.size() - 1);
  close(file);
  long long in = 0;
  long long out = 0;
  const bool good =
      count > 0 && std::sscanf(text.data(), "rchar: %lld\nwchar: %lld", &in, &out) == 2;
  return good ? in + out : 0;
}

/// Whether the threads of the program get anything done while it is in no step.
class OwnProgress {
 public:
  void sample(std::int64_t now) {
    const std::int64_t used = processor_ns(RUSAGE_SELF) - processor_ns(RUSAGE_THREAD);
    const bool computes = used - used_ns_ >= (now - sampled_ns_) / 100;
    const std::int64_t moved = computes ? moved_ : moved_by_files();
    if (computes || moved != moved_) progress_ns_ = now;
    used_ns_ = used;
    moved_ = moved;
    sampled_ns_ = now;
  }
  std::int64_t idle_ns(std::int64_t now) const { return now - progress_ns_; }

 private:
  std::int64_t sampled_ns_ = 0;
  std::int64_t used_ns_ = 0;
  std::int64_t moved_ = 0;
  std::int64_t progress_ns_ = now_ns();
};

void end_at_once(int) { _exit(kExitPeer); }

}  // namespace

class Watchdog::Thread {
 public:
  void start(double timeout_seconds) {
    const std::lock_guard lock(mutex_);
    timeout_ns_ = static_cast<std::int64_t>(timeout_seconds * 1e9);
    watch_ = WatchedPeers(timeout_ns_);
    set_stalled_after(timeout_seconds / 2);
    if (started_) return;
    started_ = true;
    // A process may be stopped before its thread first runs.
    looked_ns_ = now_ns();
    operation_log().note_running();
    // What signals.cpp does on SIGCONT is for the main thread.
    sigset_t wake{};
    sigset_t kept{};
    sigemptyset(&wake);
    sigaddset(&wake, SIGCONT);
    pthread_sigmask(SIG_BLOCK, &wake, &kept);
    std::thread([this] { run(); }).detach();
    pthread_sigmask(SIG_SETMASK, &kept, nullptr);
  }

  void connect(MpiHandle ranks) {
    if (!started_ || comm_ != MPI_COMM_NULL) return;
    const LoggedStep step("watchdogs meet");
    const WaitForStep wait(step);
    int level = MPI_THREAD_SINGLE;
    ANNULUS_CHECK_MPI(MPI_Query_thread(&level));
    MPI_Comm own = MPI_COMM_NULL;
    ANNULUS_CHECK_MPI(MPI_Comm_dup(MPI_Comm_f2c(ranks.fortran), &own));
    ANNULUS_CHECK_MPI(MPI_Comm_set_errhandler(own, MPI_ERRORS_RETURN));
    int rank = 0;
    ANNULUS_CHECK_MPI(MPI_Comm_rank(own, &rank));
    const std::vector<std::string> hosts = gather_hosts(own);
    stop_when_mpi_ends();
    const std::lock_guard lock(mutex_);
    group_.emplace(world_ranks_of(ranks));
    hosts_ = hosts;
    comm_ = own;
    rank_ = group_->world_rank(rank);
    asks_ = level == MPI_THREAD_MULTIPLE;
    if (asks_) listen();
  }

  double timeout_seconds() {
    const std::lock_guard lock(mutex_);
    return started_ ? static_cast<double>(timeout_ns_) * 1e-9 : 0.0;
  }

  [[noreturn]] void end_job(std::string_view why) {
    {
      const std::lock_guard lock(mutex_);
      SignalText text;
      append_identity(text);
      text << why << "; in ";
      append_whereabouts(text);
      if (dump_steps("transport")) text << "; last steps in " << dump_folder();
      text << "\n";
      text.write_to(STDERR_FILENO);
      ask_for_dumps();
    }
    abort_all();
  }

  void disconnect() noexcept {
    if (comm_ == MPI_COMM_NULL) return;
    {
      const WaitingStep step("end of all ranks", *group_, 0);
      static_cast<void>(MPI_Barrier(comm_));
    }
    stop_asking();
  }

 private:
  struct Message {
    MPI_Request request = MPI_REQUEST_NULL;
    RankAnswer content;
  };

  /// The communicator stays until MPI ends: a late question may still come to it.
  void stop_asking() noexcept {
    const std::lock_guard lock(mutex_);
    if (asks_) {
      static_cast<void>(MPI_Cancel(&incoming_));
      static_cast<void>(MPI_Request_free(&incoming_));
    }
    asks_ = false;
    comm_ = MPI_COMM_NULL;
  }

  /// MPI_Finalize first drops the attributes of MPI_COMM_SELF, while all of MPI still works (MPI
  /// 3.1, 8.7.1). Ranks not yet disconnected meet there, so that one that never comes is asked for
  /// by name: inside MPI_Finalize they would wait in a fence of the launcher's, and Open MPI's
  /// launcher may crash when ranks leave that.
  void stop_when_mpi_ends() {
    int key = MPI_KEYVAL_INVALID;
    const auto on_end = [](MPI_Comm, int, void* attribute, void*) -> int {
      auto& thread = *static_cast<Thread*>(attribute);
      thread.disconnect();
      // The wait for what MPI_Finalize itself does begins here.
      if (const auto ending = operation_log().waiting()) operation_log().moved(ending->number, 0);
      thread.mpi_ends_ = true;
      return MPI_SUCCESS;
    };
    ANNULUS_CHECK_MPI(MPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, on_end, &key, nullptr));
    ANNULUS_CHECK_MPI(MPI_Comm_set_attr(MPI_COMM_SELF, key, this));
    ANNULUS_CHECK_MPI(MPI_Comm_free_keyval(&key));
  }

  static std::vector<std::string> gather_hosts(MPI_Comm comm) {
    int size = 0;
    ANNULUS_CHECK_MPI(MPI_Comm_size(comm, &size));
    std::array<char, 64> mine{};
    copy_text(identity_from_environment().host, mine);
    std::vector<std::array<char, 64>> all(static_cast<std::size_t>(size));
    checked_all_gather(MpiHandle{MPI_Comm_c2f(comm)}, mine, std::span(all));
    std::vector<std::string> hosts;
    for (const auto& host : all) hosts.emplace_back(host.data());
    return hosts;
  }

  [[noreturn]] void run() {
    for (;;) {
      std::int64_t tick = kLongestTickNs;
      {
        const std::lock_guard lock(mutex_);
        tick = tick_ns();
        look();
      }
      std::this_thread::sleep_for(std::chrono::nanoseconds(tick));
    }
  }

  std::int64_t tick_ns() const {
    return std::clamp(timeout_ns_ / 40, kShortestTickNs, kLongestTickNs);
  }

  void look() {
    const std::int64_t now = now_ns();
    if (now - looked_ns_ > timeout_ns_ / 4) patient_until_ns_ = now + timeout_ns_ / 4;
    looked_ns_ = now;
    own_.sample(now);
    operation_log().note_running();
    const auto waiting = operation_log().waiting();
    follow(waiting);
    if (asks_) {
      receive(now);
      for (const int peer : watch_.to_ask(now)) ask(peer, now);
      outgoing_.remove_if([](Message& message) {
        int done = 0;
        return MPI_Test(&message.request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done != 0;
      });
    }
    // A process that was stopped itself knows nothing of the others yet.
    if (now < patient_until_ns_) return;
    if (waiting && idle_ns(waiting, now) > timeout_ns_) give_up(*waiting, now);
  }

  void follow(const std::optional<StepRecord>& waiting) {
    if (!waiting) return watch_.wait_for(0, {}, now_ns());
    if (waiting->number == watch_.step()) {
      return watch_.wait_for(waiting->number,
                             std::vector(watch_.peers().begin(), watch_.peers().end()),
                             waiting->moved_ns);
    }
    std::vector<int> peers;
    if (asks_ && waiting->group_number > 0) {
      peers = ranks_to_watch(operation_log().members(waiting->group), rank_);
    } else if (asks_) {
      std::copy_if(waiting->peer.begin(), waiting->peer.end(), std::back_inserter(peers),
                   [this](int peer) { return peer >= 0 && peer != rank_; });
    }
    watch_.wait_for(waiting->number, peers, waiting->moved_ns);
  }

  std::int64_t idle_ns(const std::optional<StepRecord>& waiting, std::int64_t now) const {
    return waiting ? watch_.idle_ns(now - waiting->moved_ns, now) : own_.idle_ns(now);
  }

  // ---- questions and answers --------------------------------------------------------------------

  void listen() {
    static_cast<void>(MPI_Irecv(&received_, sizeof(received_), MPI_BYTE, MPI_ANY_SOURCE,
                                MPI_ANY_TAG, comm_, &incoming_));
  }

  void receive(std::int64_t now) {
    for (;;) {
      int done = 0;
      MPI_Status status{};
      if (MPI_Test(&incoming_, &done, &status) != MPI_SUCCESS || done == 0) return;
      const RankAnswer message = received_;
      listen();
      const int peer = group_->world_rank(status.MPI_SOURCE);
      if (status.MPI_TAG == kQuestionTag) send(peer, kAnswerTag, answer(now));
      if (status.MPI_TAG == kDumpTag) static_cast<void>(dump_steps("timeout of another rank"));
      if (status.MPI_TAG == kAnswerTag) watch_.answered(peer, message, now);
    }
  }

  void ask(int peer, std::int64_t now) {
    send(peer, kQuestionTag, {});
    watch_.asked(peer, now);
  }

  /// Place of a world rank in our communicator.
  int place_of(int rank) const {
    const auto ranks = group_->world_ranks();
    return static_cast<int>(std::find(ranks.begin(), ranks.end(), rank) - ranks.begin());
  }

  void send(int peer, int tag, const RankAnswer& content) {
    Message& message = outgoing_.emplace_back();
    message.content = content;
    static_cast<void>(MPI_Isend(&message.content, sizeof(message.content), MPI_BYTE, place_of(peer),
                                tag, comm_, &message.request));
  }

  RankAnswer answer(std::int64_t now) const {
    const OperationLog& log = operation_log();
    const auto waiting = log.waiting();
    const auto step = waiting ? waiting : log.last();
    RankAnswer result;
    copy_text(log.phase(), result.phase);
    if (step) copy_text(step->name, result.step_name);
    result.step = step ? step->number : 0;
    result.waiting = waiting ? 1 : 0;
    result.idle_ns = idle_ns(waiting, now);
    if (waiting) result.suspect = watch_.suspect(now).rank;
    return result;
  }

  // ---- the end ----------------------------------------------------------------------------------

  void append_rank(SignalText& text, int rank) const {
    text << "rank " << rank;
    const auto at = group_ ? static_cast<std::size_t>(place_of(rank)) : hosts_.size();
    if (at < hosts_.size()) text << " (" << hosts_[at] << ")";
  }

  void append_suspect(SignalText& text, std::int64_t now) const {
    const WatchedPeers::Suspect suspect = watch_.suspect(now);
    operation_log().blame(suspect.rank);
    if (suspect.rank < 0) return;
    text << "; suspect ";
    append_rank(text, suspect.rank);
    if (suspect.through >= 0) {
      text << ", for whom ";
      append_rank(text, suspect.through);
      text << " waits";
    }
    if (suspect.silent) {
      text << ", whose process has not answered for ";
      text.seconds(suspect.silent_ns) << " s";
    }
    if (!suspect.ever_heard || suspect.through >= 0) return;
    text << (suspect.silent ? ", last seen in " : ", which is in ") << "phase "
         << suspect.last.phase.data() << (suspect.last.waiting != 0 ? ", waiting in" : ", after")
         << " step " << suspect.last.step << ": " << suspect.last.step_name.data();
  }

  void give_up(const StepRecord& step, std::int64_t now) {
    SignalText text;
    append_identity(text);
    text << "no progress for ";
    text.seconds(now - step.moved_ns) << " s (--timeout ";
    text.seconds(timeout_ns_) << ") in phase " << operation_log().phase() << ", ";
    append_step(text, step);
    append_suspect(text, now);
    if (dump_steps("timeout")) {
      text << "; `annulus diverged " << dump_folder() << "` compares the ranks' last steps";
    }
    text << "\n";
    text.write_to(STDERR_FILENO);
    ask_for_dumps();
    abort_all();
  }

  /// Between the launcher's SIGTERM and SIGKILL a rank on a busy core may not get to its dump.
  void ask_for_dumps() {
    if (!asks_) return;
    for (const int rank : group_->world_ranks()) {
      if (rank != rank_) send(rank, kDumpTag, {});
    }
    const std::int64_t end = now_ns() + 2 * tick_ns();
    while (now_ns() < end) {
      for (Message& message : outgoing_) {
        int done = 0;
        static_cast<void>(MPI_Test(&message.request, &done, MPI_STATUS_IGNORE));
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  /// The job must end even where the launcher's daemons no longer answer MPI_Abort. Beside
  /// MPI_Finalize it crashes or leaves the launcher waiting: there this process ends alone, and the
  /// launcher ends the others.
  [[noreturn]] void abort_all() {
    static_cast<void>(signal(SIGALRM, end_at_once));
    static_cast<void>(alarm(kAbortPatienceSeconds));
    int started = 0;
    int ended = 0;
    static_cast<void>(MPI_Initialized(&started));
    static_cast<void>(MPI_Finalized(&ended));
    if (started != 0 && ended == 0 && !mpi_ends_)
      static_cast<void>(MPI_Abort(MPI_COMM_WORLD, kExitPeer));
    _exit(kExitPeer);
  }

  std::atomic<bool> mpi_ends_{false};  // the program is in MPI_Finalize
  std::mutex mutex_;                   // all below, between the thread and the callers
  bool started_ = false;
  std::int64_t timeout_ns_ = 0;
  std::int64_t looked_ns_ = 0;         // the last time
  std::int64_t patient_until_ns_ = 0;  // no judgement before
  WatchedPeers watch_{0};
  OwnProgress own_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  bool asks_ = false;
  int rank_ = 0;                         // in the world
  std::optional<OperationGroup> group_;  // of comm_
  std::vector<std::string> hosts_;       // of its members
  MPI_Request incoming_ = MPI_REQUEST_NULL;
  RankAnswer received_;
  std::list<Message> outgoing_;
};

Watchdog::Watchdog() : thread_(new Thread) {}

Watchdog& Watchdog::of_process() {
  static Watchdog& watchdog = *new Watchdog;
  return watchdog;
}

void Watchdog::start(double timeout_seconds) {
  require(timeout_seconds > 0.0 && timeout_seconds <= kLongestTimeout, ExitCode::usage,
          "watchdog: timeout {} s; accepted: above 0 and at most {}", timeout_seconds,
          kLongestTimeout);
  thread_->start(timeout_seconds);
}

void Watchdog::connect(MpiHandle ranks) { thread_->connect(ranks); }

double Watchdog::timeout_seconds() const { return thread_->timeout_seconds(); }

void Watchdog::end_job(std::string_view why) { thread_->end_job(why); }

void Watchdog::disconnect() noexcept { thread_->disconnect(); }

}  // namespace annulus
