#include "runtime/hdf5_probe.hpp"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <exception>

#include "kernels/error.hpp"
#include "runtime/posix_file.hpp"

namespace annulus {
namespace {

constexpr unsigned kMostSeconds = 20;

// The program's own handlers would report a rank that died.
void restore_default_signals() {
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM, SIGTERM, SIGUSR1}) {
    static_cast<void>(std::signal(signal, SIG_DFL));
  }
  sigset_t none;
  sigemptyset(&none);
  static_cast<void>(pthread_sigmask(SIG_SETMASK, &none, nullptr));
}

[[noreturn]] void run_child(const std::function<void()>& walk) {
  restore_default_signals();
  static_cast<void>(prctl(PR_SET_PDEATHSIG, SIGKILL));
  alarm(kMostSeconds);
  try {
    walk();
  } catch (const std::exception&) {
  }
  _exit(0);
}

}  // namespace

void probe_in_child(const std::string& path, const std::function<void()>& walk) {
  const pid_t child = fork();
  if (child == 0) run_child(walk);
  require(child > 0, ExitCode::no_memory, "{}: no process to probe it in: {}", path,
          errno_text(errno));
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    require(errno == EINTR, ExitCode::internal, "{}: its probe was lost: {}", path,
            errno_text(errno));
  }
  require(!WIFSIGNALED(status), ExitCode::bad_data,
          "{}: is damaged: HDF5 ends with \"{}\" when it reads it", path,
          strsignal(WTERMSIG(status)));
}

}  // namespace annulus
