#include "runtime/signals.hpp"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "runtime/operation_log.hpp"

namespace annulus {
namespace {

using std::chrono::milliseconds;

constexpr std::int64_t kHoldNs = 2'000'000'000;

/// Reports its clock through the pipe each millisecond until it is told to end.
[[noreturn]] void tick(int to) {
  set_stalled_after(0.1);
  install_signal_handlers();
  for (;;) {
    operation_log().note_running();
    const std::int64_t now = now_ns();
    if (write(to, &now, sizeof now) != sizeof now) _exit(1);
    std::this_thread::sleep_for(milliseconds(1));
  }
}

/// How long a process that was stopped for `pause` does nothing after it was woken.
std::int64_t idle_after_waking_ns(milliseconds pause) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) tick(ends[1]);
  close(ends[1]);
  std::int64_t ticked = 0;
  const auto next_tick = [&] {
    return read(ends[0], &ticked, sizeof ticked) == static_cast<ssize_t>(sizeof ticked);
  };
  EXPECT_TRUE(next_tick());
  kill(child, SIGSTOP);
  int status = 0;
  waitpid(child, &status, WUNTRACED);
  std::this_thread::sleep_for(pause);
  const std::int64_t woken = now_ns();
  kill(child, SIGCONT);
  while (next_tick() && ticked < woken) continue;
  kill(child, SIGTERM);
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 143) << status;
  close(ends[0]);
  return ticked - woken;
}

TEST(Signals, AProcessThatWakesLateWaitsForTheEndOfTheJob) {
  EXPECT_GE(idle_after_waking_ns(milliseconds(300)), kHoldNs);
}

TEST(Signals, AProcessThatIsHeldGoesOnWithNothingBeforeItIsToldToEnd) {
  const pid_t child = fork();
  if (child == 0) {
    set_stalled_after(0.1);
    install_signal_handlers();
    operation_log().note_running();
    raise(SIGSTOP);
    _exit(1);  // went on
  }
  int status = 0;
  waitpid(child, &status, WUNTRACED);
  std::this_thread::sleep_for(milliseconds(300));
  kill(child, SIGCONT);
  std::this_thread::sleep_for(milliseconds(100));  // enough to go on, were it not held
  kill(child, SIGTERM);
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 143) << status;
}

// A rank that writes to a dead one says where it was when the launcher tells it to end.
TEST(Signals, AProcessAtABrokenPipeWaitsForTheEndOfTheJob) {
  const pid_t child = fork();
  if (child == 0) {
    install_signal_handlers();
    hold_at_broken_pipes();
    int ends[2];
    if (pipe(ends) != 0) _exit(2);
    close(ends[0]);
    static_cast<void>(!write(ends[1], "x", 1));
    _exit(1);  // went on
  }
  std::this_thread::sleep_for(milliseconds(300));  // enough to go on, were it not held
  kill(child, SIGTERM);
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 143) << status;
}

}  // namespace
}  // namespace annulus
