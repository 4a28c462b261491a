#include "runtime/signals.hpp"

#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>

#include "runtime/flight_recorder.hpp"

// Present where a sanitizer is linked in.
extern "C" {
[[gnu::weak]] void __asan_init();
[[gnu::weak]] void __tsan_init();
}

namespace annulus {
namespace {

std::array<std::atomic<void (*)() noexcept>, 8> actions{};
std::atomic<int> agreed_status{-1};  // none yet
std::atomic<std::int64_t> stalled_after_ns{std::numeric_limits<std::int64_t>::max()};

constexpr std::int64_t kLongPauseNs = 2'000'000'000;
constexpr std::int64_t kBrokenPipeHoldNs = 5'000'000'000;
constexpr timespec kHold{.tv_sec = 2, .tv_nsec = 0};
constexpr std::int64_t kRecentSteps = 16;
constexpr std::int64_t kRecentNs = 5'000'000'000;

const char* name_of(int signal) noexcept {
  switch (signal) {
    case SIGTERM:
      return "SIGTERM";
    case SIGUSR1:
      return "SIGUSR1";
    case SIGUSR2:
      return "SIGUSR2";
    case SIGINT:
      return "SIGINT";
    case SIGSEGV:
      return "SIGSEGV";
    case SIGBUS:
      return "SIGBUS";
    case SIGFPE:
      return "SIGFPE";
    case SIGILL:
      return "SIGILL";
    case SIGABRT:
      return "SIGABRT";
    default:
      return "signal";
  }
}

/// A step that just ended counts as well: peers that were stopped go on when the job is ended.
bool has_stalled() noexcept {
  const OperationLog& log = operation_log();
  const std::int64_t now = now_ns();
  const std::int64_t newest = log.newest();
  for (std::int64_t number = newest; number > newest - kRecentSteps; --number) {
    const auto step = log.step(number);
    if (!step || (step->ended_ns != 0 && now - step->ended_ns > kRecentNs)) continue;
    const std::int64_t end = step->ended_ns != 0 ? step->ended_ns : now;
    const bool waited = step->ended_ns != 0 || step->state == StepRecord::State::waiting;
    if (waited && end - step->moved_ns > stalled_after_ns) return true;
  }
  return log.paused_ns() > stalled_after_ns;
}

void report(int signal, bool dump) noexcept {
  SignalText line;
  append_identity(line);
  line << name_of(signal) << " in ";
  append_whereabouts(line);
  if (const std::int64_t paused = operation_log().paused_ns(); paused > kLongPauseNs) {
    line << "; this process did not run for ";
    line.seconds(paused) << " s";
  }
  if (dump && dump_steps(name_of(signal))) line << "; last steps in " << dump_folder();
  line << "\n";
  line.write_to(STDERR_FILENO);
}

/// Another thread may be in a handler already, or the same signal may come twice.
bool is_first_end() noexcept {
  static std::atomic_flag ending;
  return !ending.test_and_set();
}

void end_in_order(int signal) {
  if (!is_first_end()) return;
  const int agreed = agreed_status;
  if (agreed < 0) report(signal, has_stalled());
  for (const auto& action : actions) {
    if (void (*run)() noexcept = action.load()) run();
  }
  if (agreed >= 0) _exit(agreed);
  _exit(signal == SIGINT ? 130 : 143);
}

void end_by_fault(int signal) {
  if (is_first_end()) {
    report(signal, true);
    for (const auto& action : actions) {
      if (void (*run)() noexcept = action.load()) run();
    }
  }
  // SA_RESETHAND has put the default back; the signal is blocked until this handler returns.
  static_cast<void>(raise(signal));
}

void show(int signal) { report(signal, true); }

/// A launcher that ends a job wakes what is stopped, then sends SIGTERM. The main thread waits for
/// that: if it went on, MPI could join the launcher's fence that the others are leaving, and Open
/// MPI 4.1's launcher crashes over that (PMIx completes the fence twice).
void hold_when_late(int) {
  const int kept_errno = errno;
  if (gettid() != getpid()) {
    static_cast<void>(tgkill(getpid(), getpid(), SIGCONT));
  } else if (operation_log().paused_ns() > stalled_after_ns) {
    nanosleep(&kHold, nullptr);
  }
  errno = kept_errno;
}

void hold_at_broken_pipe(int) {
  static std::atomic<std::int64_t> end{0};  // of the wait of all threads
  const int kept_errno = errno;
  std::int64_t none = 0;
  end.compare_exchange_strong(none, now_ns() + kBrokenPipeHoldNs);
  for (std::int64_t left = end - now_ns(); left > 0; left = end - now_ns()) {
    const timespec time{left / 1'000'000'000, left % 1'000'000'000};
    nanosleep(&time, nullptr);
  }
  errno = kept_errno;
}

void handle(int signal, void (*handler)(int), int flags, bool interruptible = false) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = flags;
  if (!interruptible) sigfillset(&action.sa_mask);
  static_cast<void>(sigaction(signal, &action, nullptr));
}

/// A stack that has overflowed cannot carry the handler.
void use_own_stack() {
  static std::array<char, 64 * 1024> memory;
  stack_t stack{};
  stack.ss_sp = memory.data();
  stack.ss_size = memory.size();
  static_cast<void>(sigaltstack(&stack, nullptr));
}

}  // namespace

void install_signal_handlers() {
  static_cast<void>(operation_log());  // exists before the first handler looks for it
  use_own_stack();
  for (const int signal : {SIGTERM, SIGUSR1, SIGINT}) handle(signal, end_in_order, SA_RESTART);
  handle(SIGUSR2, show, SA_RESTART);
  handle(SIGCONT, hold_when_late, SA_RESTART, true);
  handle(SIGXFSZ, SIG_IGN, 0);  // a limit on the size of files is then an error of the write
  if (__asan_init != nullptr || __tsan_init != nullptr) return;  // their own reports say more
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
    handle(signal, end_by_fault, static_cast<int>(SA_RESETHAND) | SA_ONSTACK);
  }
}

void hold_at_broken_pipes() noexcept { handle(SIGPIPE, hold_at_broken_pipe, SA_RESTART, true); }

void on_signal_end(void (*action)() noexcept) {
  for (auto& place : actions) {
    void (*none)() noexcept = nullptr;
    if (place.compare_exchange_strong(none, action)) return;
  }
}

void set_agreed_end(int status) noexcept { agreed_status = status; }

void set_stalled_after(double seconds) noexcept {
  stalled_after_ns = static_cast<std::int64_t>(seconds * 1e9);
}

}  // namespace annulus
