#include "launch/guard.hpp"

#include "kernels/cpu/peak.hpp"
#include "kernels/error.hpp"
#include "runtime/flight_recorder.hpp"
#include "runtime/pending_file.hpp"
#include "runtime/signals.hpp"
#include "runtime/watchdog.hpp"
#include "runtime/window_files.hpp"

namespace annulus::launch {
namespace {

constexpr double kTimeoutSeconds = 30.0;
constexpr int kMostThreads = 8192;  // of which OpenMP's tables still fit the stack

}  // namespace

void guard_process() {
  const ProcessIdentity identity = identity_from_environment();
  identify_process(identity);
  find_window_files();
  on_signal_end(remove_pending_files);
  on_signal_end(remove_window_files);
  install_signal_handlers();
  if (identity.size > 1) hold_at_broken_pipes();
  Watchdog::of_process().start(kTimeoutSeconds);
  require(kernels::cpu::threads() <= kMostThreads, ExitCode::usage,
          "OMP_NUM_THREADS: {} threads; accepted: at most {}", kernels::cpu::threads(),
          kMostThreads);
}

}  // namespace annulus::launch
