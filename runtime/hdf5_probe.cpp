#include "runtime/hdf5_probe.hpp"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>

#include "kernels/error.hpp"
#include "runtime/byte_stream.hpp"
#include "runtime/posix_file.hpp"

namespace annulus {
namespace {

constexpr unsigned kMostSeconds = 20;
constexpr std::uint64_t kMostAnswerBytes = std::uint64_t{1} << 30;
// Of the answer's first byte.
constexpr char kAnswered = 'a';
constexpr char kThrew = 't';

// ---- in the child -------------------------------------------------------------------------------

// The program's own handlers would report a rank that died.
void restore_default_signals() {
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM, SIGTERM, SIGUSR1}) {
    static_cast<void>(std::signal(signal, SIG_DFL));
  }
  sigset_t none;
  sigemptyset(&none);
  static_cast<void>(pthread_sigmask(SIG_SETMASK, &none, nullptr));
}

// What the C library says of a damaged heap is not for the user, and a core of it not for the disk.
void give_up_rights() {
  const int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
  for (const int standard : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    static_cast<void>(dup2(nothing, standard));
  }
  const rlimit none{0, 0};
  static_cast<void>(setrlimit(RLIMIT_CORE, &none));
  static_cast<void>(setrlimit(RLIMIT_FSIZE, &none));
}

std::vector<std::byte> thrown(ExitCode code, const char* message) {
  ByteWriter writer;
  writer.put(kThrew);
  writer.put(static_cast<std::int32_t>(code));
  writer.put_text(message);
  return writer.take();
}

std::vector<std::byte> answer_of(const std::function<std::vector<std::byte>()>& walk) {
  try {
    ByteWriter writer;
    writer.put(kAnswered);
    writer.put_bytes(walk());
    return writer.take();
  } catch (const Error& error) {
    return thrown(error.code(), error.what());
  } catch (const std::bad_alloc& error) {
    return thrown(ExitCode::no_memory, error.what());
  } catch (const std::exception& error) {
    return thrown(ExitCode::internal, error.what());
  }
}

bool write_all(int pipe, const void* data, std::size_t bytes) {
  const auto* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = write(pipe, next, bytes);
    if (written < 0 && errno != EINTR) return false;
    next += std::max<ssize_t>(written, 0);
    bytes -= static_cast<std::size_t>(std::max<ssize_t>(written, 0));
  }
  return true;
}

[[noreturn]] void run_child(int pipe, const std::function<std::vector<std::byte>()>& walk) {
  restore_default_signals();
  static_cast<void>(prctl(PR_SET_PDEATHSIG, SIGKILL));
  give_up_rights();
  keep_asking();
  const std::vector<std::byte> answer = answer_of(walk);
  const auto bytes = static_cast<std::uint64_t>(answer.size());
  const bool sent =
      write_all(pipe, &bytes, sizeof bytes) && write_all(pipe, answer.data(), answer.size());
  _exit(sent ? 0 : 1);
}

// ---- in the parent ------------------------------------------------------------------------------

bool read_all(int pipe, void* data, std::size_t bytes) {
  auto* next = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t got = read(pipe, next, bytes);
    if (got == 0 || (got < 0 && errno != EINTR)) return false;
    next += std::max<ssize_t>(got, 0);
    bytes -= static_cast<std::size_t>(std::max<ssize_t>(got, 0));
  }
  return true;
}

// Nothing when the child ended before its answer was complete.
std::optional<std::vector<std::byte>> receive(int pipe) {
  std::uint64_t bytes = 0;
  if (!read_all(pipe, &bytes, sizeof bytes) || bytes > kMostAnswerBytes) return std::nullopt;
  std::vector<std::byte> answer;
  // Memory follows what arrives, whatever was announced.
  constexpr std::uint64_t kPiece = std::uint64_t{1} << 24;
  while (answer.size() < bytes) {
    const std::size_t at = answer.size();
    answer.resize(at + std::min(kPiece, bytes - at));
    if (!read_all(pipe, answer.data() + at, answer.size() - at)) return std::nullopt;
  }
  return answer;
}

int end_of(pid_t child, const std::string& path) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    require(errno == EINTR, ExitCode::internal, "{}: its probe was lost: {}", path,
            errno_text(errno));
  }
  return status;
}

std::string in_words(int status) {
  if (WIFSIGNALED(status)) return strsignal(WTERMSIG(status));
  return fmt::format("status {}", WEXITSTATUS(status));
}

}  // namespace

void keep_asking() noexcept { static_cast<void>(alarm(kMostSeconds)); }

std::vector<std::byte> ask_in_child(const std::string& path,
                                    const std::function<std::vector<std::byte>()>& walk) {
  std::array<int, 2> ends{-1, -1};
  require(pipe2(ends.data(), O_CLOEXEC) == 0, ExitCode::no_memory, "{}: no pipe to probe it: {}",
          path, errno_text(errno));
  const FileDescriptor from(ends[0]);
  FileDescriptor to(ends[1]);
  const pid_t child = fork();
  if (child == 0) run_child(to.value(), walk);
  require(child > 0, ExitCode::no_memory, "{}: no process to probe it in: {}", path,
          errno_text(errno));
  to.close(path);
  const std::optional<std::vector<std::byte>> answer = receive(from.value());
  if (!answer) static_cast<void>(kill(child, SIGKILL));  // it may still be at it
  const int status = end_of(child, path);
  require(answer.has_value(), ExitCode::bad_data,
          "{}: is damaged: HDF5 ends with \"{}\" when it reads it", path, in_words(status));
  ByteReader reader(*answer, path + ": the answer of its probe");
  if (reader.take<char>() != kAnswered) {
    const auto code = reader.take<std::int32_t>();
    const bool known = code >= static_cast<std::int32_t>(ExitCode::usage) &&
                       code <= static_cast<std::int32_t>(ExitCode::peer);
    throw Error(known ? static_cast<ExitCode>(code) : ExitCode::bad_data, reader.take_text());
  }
  const auto bytes = reader.take_bytes();
  return {bytes.begin(), bytes.end()};
}

}  // namespace annulus
