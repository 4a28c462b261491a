#include "launch/progress.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <string_view>

#include "kernels/work_meter.hpp"
#include "runtime/operation_log.hpp"

namespace annulus::launch {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPeriod = std::chrono::milliseconds(200);
constexpr double kQuietSeconds = 2.0;
constexpr int kCells = 30;

// mpirun gives each rank a process group of its own: the job is in the foreground where mpirun is.
bool in_foreground(int terminal) {
  const pid_t group = tcgetpgrp(terminal);
  return group == getpgrp() || group == getpgid(getppid());
}

void write_all(int terminal, std::string_view text) {
  // A terminal that takes nothing more loses a picture, nothing else.
  static_cast<void>(!write(terminal, text.data(), text.size()));
}

}  // namespace

std::string progress_text(const char* phase, double fraction, double seconds) {
  if (fraction <= 0.0) return fmt::format("{}, {:.0f} s", phase, seconds);
  const double done = std::min(fraction, 1.0);
  const auto cells = static_cast<int>(done * kCells);
  return fmt::format("{} [{:#>{}}{:.>{}}] {:3.0f}%, {:.0f} s left", phase, "", cells, "",
                     kCells - cells, done * 100.0, seconds * (1.0 - done) / done);
}

ProgressBar::ProgressBar(bool shown) {
  if (!shown) return;
  terminal_ = open("/dev/tty", O_WRONLY | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
  if (terminal_ >= 0) thread_ = std::thread(&ProgressBar::run, this);
}

ProgressBar::~ProgressBar() {
  if (terminal_ < 0) return;
  {
    const std::lock_guard lock(mutex_);
    ends_ = true;
  }
  wake_.notify_one();
  thread_.join();
  erase();
  close(terminal_);
}

void ProgressBar::run() {
  const std::string_view computing = "computing";
  const Clock::time_point begin = Clock::now();
  Clock::time_point computing_begin = begin;
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, kPeriod, [&] { return ends_; })) {
    const Clock::time_point now = Clock::now();
    const bool computes = operation_log().phase() == computing;
    if (!computes) computing_begin = now;
    if (std::chrono::duration<double>(now - begin).count() < kQuietSeconds) continue;
    const Clock::time_point since = computes ? computing_begin : begin;
    paint(std::chrono::duration<double>(now - since).count());
  }
}

void ProgressBar::paint(double seconds) {
  if (!in_foreground(terminal_)) return;
  const char* phase = operation_log().phase();
  const double expected = work_meter().expected();
  const bool counts = std::string_view(phase) == "computing" && expected > 0.0;
  const double fraction = counts ? work_meter().done() / expected : 0.0;
  write_all(terminal_, fmt::format("\r{}\x1b[K", progress_text(phase, fraction, seconds)));
  painted_ = true;
}

void ProgressBar::erase() {
  if (painted_ && in_foreground(terminal_)) write_all(terminal_, "\r\x1b[K");
}

}  // namespace annulus::launch
