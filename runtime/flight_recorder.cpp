#include "runtime/flight_recorder.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace annulus {
namespace {

constexpr int kShownPeers = 4;

/// What handlers read: plain memory, complete before the first handler is installed.
struct Identity {
  int rank = 0;
  int size = 1;
  std::array<char, 64> host{};
  std::array<char, 512> folder{};
  std::array<char, 560> file{};
  std::array<char, 560> part{};  // its name until it is complete
};

Identity& identity() {
  static Identity value;
  return value;
}

template <std::size_t Size>
void copy_text(std::string_view from, std::array<char, Size>& to) {
  const std::size_t length = std::min(from.size(), Size - 1);
  std::memcpy(to.data(), from.data(), length);
  to[length] = '\0';
}

int number_from(std::initializer_list<const char*> variables, int otherwise) {
  for (const char* variable : variables) {
    if (const char* text = std::getenv(variable)) return std::atoi(text);
  }
  return otherwise;
}

std::string job_name() {
  // mpirun's own id first: in a batch job several may run one after the other.
  for (const char* variable : {"OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID"}) {
    if (const char* text = std::getenv(variable)) return text;
  }
  return std::to_string(getpid());
}

void append_record(SignalText& text, const StepRecord& step) noexcept {
  text << step.number << " " << step.name << " group ";
  text.hex(step.group) << " " << step.group_number << " peers " << step.peers;
  for (const int peer : step.peer) text << " " << peer;
  text << " bytes " << step.bytes << " outstanding " << step.outstanding << " begun "
       << step.begun_ns << " moved " << step.moved_ns << " ended " << step.ended_ns << " "
       << name(step.state) << "\n";
}

void write_dump(int file, std::string_view reason) noexcept {
  const OperationLog& log = operation_log();
  const Identity& me = identity();
  SignalText head;
  head << "annulus-steps 1\nrank " << me.rank << " size " << me.size << " pid " << getpid()
       << " host " << me.host.data() << "\nreason " << reason << "\nphase " << log.phase()
       << "\npaused " << log.paused_ns() << " suspect " << log.suspect() << " now " << now_ns()
       << "\n";
  head.write_to(file);
  const std::int64_t newest = log.newest();
  const std::int64_t oldest = std::max<std::int64_t>(1, newest - OperationLog::kKept + 1);
  for (std::int64_t number = oldest; number <= newest; ++number) {
    const auto step = log.step(number);
    if (!step) continue;
    SignalText line;
    append_record(line, *step);
    line.write_to(file);
  }
}

}  // namespace

void SignalText::write_to(int file) const noexcept {
  std::size_t done = 0;
  while (done < size_) {
    const ssize_t count = write(file, buffer_.data() + done, size_ - done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return;
    done += static_cast<std::size_t>(count);
  }
}

ProcessIdentity identity_from_environment() {
  ProcessIdentity result;
  // Under mpirun in a batch job SLURM's variables are those of mpirun's daemons.
  const bool by_mpirun = std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr;
  result.rank = by_mpirun ? number_from({"OMPI_COMM_WORLD_RANK"}, 0)
                          : number_from({"PMIX_RANK", "SLURM_PROCID"}, 0);
  result.size = by_mpirun ? number_from({"OMPI_COMM_WORLD_SIZE"}, 1)
                          : number_from({"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"}, 1);
  std::array<char, 64> host{};
  if (gethostname(host.data(), host.size() - 1) == 0) result.host = host.data();
  const char* folder = std::getenv("ANNULUS_DUMP_DIR");
  result.dump_folder = folder != nullptr ? folder : "annulus-steps." + job_name();
  return result;
}

void identify_process(const ProcessIdentity& process) {
  Identity& to = identity();
  to.rank = process.rank;
  to.size = process.size;
  copy_text(process.host, to.host);
  copy_text(process.dump_folder, to.folder);
  std::string digits = std::to_string(process.rank);
  digits.insert(0, digits.size() < 6 ? 6 - digits.size() : 0, '0');
  copy_text(process.dump_folder + "/rank-" + digits, to.file);
  copy_text(process.dump_folder + "/.rank-" + digits, to.part);
}

void append_identity(SignalText& text) noexcept {
  text << "rank " << identity().rank << " (" << identity().host.data() << "): ";
}

void append_step(SignalText& text, const StepRecord& step) noexcept {
  text << "step " << step.number << ": " << step.name;
  if (step.group_number > 0) {
    text << " of " << step.peers + 1 << " ranks";
  } else if (step.peers > 0) {
    text << (step.peers == 1 ? " with rank " : " with ranks ");
    for (int i = 0; i < step.peers && i < kShownPeers; ++i) {
      text << (i > 0 ? ", " : "") << step.peer[static_cast<std::size_t>(i)];
    }
    if (step.peers > kShownPeers) text << " and " << step.peers - kShownPeers << " more";
  }
  text << ", " << step.outstanding << " of " << step.bytes << " bytes outstanding";
}

void append_whereabouts(SignalText& text) noexcept {
  const OperationLog& log = operation_log();
  text << "phase " << log.phase();
  if (const auto step = log.waiting()) {
    text << ", waiting for ";
    text.seconds(now_ns() - step->moved_ns) << " s in ";
    append_step(text, *step);
  } else if (const auto last = log.last()) {
    text << ", after ";
    append_step(text, *last);
  }
}

bool dump_steps(std::string_view reason) noexcept {
  static std::atomic_flag under_way;
  if (under_way.test_and_set()) return true;
  const Identity& me = identity();
  static_cast<void>(mkdir(me.folder.data(), 0777));
  const int file =
      open(me.part.data(), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0666);
  if (file >= 0) {
    write_dump(file, reason);
    static_cast<void>(close(file));
    static_cast<void>(rename(me.part.data(), me.file.data()));
  }
  under_way.clear();
  return file >= 0;
}

std::string_view dump_folder() noexcept { return identity().folder.data(); }

}  // namespace annulus
