#include "reliability/job.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace annulus::testing {
namespace {

constexpr std::chrono::milliseconds kPoll{5};

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string random_token() {
  std::random_device random;
  std::ostringstream text;
  text << std::hex << random() << random();
  return text.str();
}

void add(std::vector<std::string>& to, const std::vector<std::string>& words) {
  to.insert(to.end(), words.begin(), words.end());
}

std::vector<std::string> command_of(const JobOptions& options) {
  std::vector<std::string> command = options.wrapper;
  if (options.ranks <= 1) {
    command.emplace_back(ANNULUS_PROGRAM);
    add(command, options.arguments);
    return command;
  }
  command.emplace_back(ANNULUS_MPIEXEC);
  const auto part = [&](int ranks, const std::vector<std::string>& arguments) {
    add(command, {ANNULUS_MPIEXEC_NUMPROC_FLAG, std::to_string(ranks), ANNULUS_PROGRAM});
    add(command, arguments);
  };
  if (options.first_rank_arguments.empty()) {
    part(options.ranks, options.arguments);
    return command;
  }
  part(1, options.first_rank_arguments);
  command.emplace_back(":");
  part(options.ranks - 1, options.arguments);
  return command;
}

void redirect(const std::string& path, int to) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (file < 0 || dup2(file, to) < 0) _exit(127);
}

bool has_token(const std::filesystem::path& process, const std::string& token) {
  std::ifstream file(process / "environ", std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str().find("ANNULUS_TEST_JOB=" + token) != std::string::npos;
}

/// What a process does and which signals it has not taken: "State: T (stopped), SigPnd: 0...".
std::string signs_of(pid_t process) {
  std::istringstream status(content_of("/proc/" + std::to_string(process) + "/status"));
  std::string result;
  for (std::string line; std::getline(status, line);) {
    for (const char* name : {"State:", "SigPnd:", "ShdPnd:"}) {
      if (line.starts_with(name)) result += (result.empty() ? "" : ", ") + line;
    }
  }
  return result;
}

std::string command_line(pid_t process) {
  std::string text = content_of("/proc/" + std::to_string(process) + "/cmdline");
  for (char& c : text) {
    if (c == '\0') c = ' ';
  }
  return text;
}

std::vector<std::string> files_below(const std::string& folder) {
  std::vector<std::string> result;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder, ignored)) {
    result.push_back(entry.path().string());
  }
  return result;
}

}  // namespace

Job::Job(const JobOptions& options) : options_(options), token_(random_token()) {
  memory_ = "/dev/shm/annulus-" + token_;
  std::filesystem::create_directory(memory_);
  std::map<std::string, std::string> environment = {
      {"ANNULUS_TEST_JOB", token_},
      {"OMPI_MCA_orte_tmpdir_base", memory_},
      {"OMPI_MCA_orte_top_session_dir", memory_ + "/ompi"},
      {"OMPI_MCA_btl_vader_backing_directory", memory_},
      {"OMPI_MCA_osc_sm_backing_directory", memory_},
      {"OMPI_MCA_shmem_mmap_backing_file_base_dir", memory_},
      {"TMPDIR", memory_},
      {"ANNULUS_DUMP_DIR", folder_.file("steps")},
      {"F_AT", folder_.file("fault")},
      {"LD_PRELOAD", ANNULUS_FAULT_SHIM}};
  for (const auto& [name, value] : options.environment) environment[name] = value;
  const std::vector<std::string> command = command_of(options);
  started_ = now_seconds();
  launcher_ = fork();
  if (launcher_ < 0) throw std::runtime_error("cannot fork");
  if (launcher_ > 0) return;
  setpgid(0, 0);
  redirect(folder_.file("out"), 1);
  redirect(folder_.file("err"), 2);
  for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
  std::vector<char*> words;
  for (const std::string& word : command) words.push_back(const_cast<char*>(word.c_str()));
  words.push_back(nullptr);
  execvp(words[0], words.data());
  _exit(127);
}

Job::~Job() {
  for (const pid_t process : processes()) kill(process, SIGKILL);
  if (launcher_ > 0) waitpid(launcher_, nullptr, 0);
  std::error_code ignored;
  std::filesystem::remove_all(memory_, ignored);
}

void Job::mark_fault() { started_ = now_seconds(); }

std::vector<pid_t> Job::processes() const {
  std::vector<pid_t> result;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    if (has_token(entry.path(), token_)) result.push_back(std::stoi(name));
  }
  return result;
}

std::vector<pid_t> Job::wait_for_ranks(int ranks) const {
  const double deadline = now_seconds() + options_.limit_seconds;
  while (now_seconds() < deadline && kill(launcher_, 0) == 0) {
    std::map<int, pid_t> by_rank;
    for (const pid_t process : processes()) {
      const std::string text = content_of("/proc/" + std::to_string(process) + "/environ");
      const std::size_t at = text.find("OMPI_COMM_WORLD_RANK=");
      const bool ours = command_line(process).starts_with(ANNULUS_PROGRAM);
      if (ours && at != std::string::npos) by_rank[std::stoi(text.substr(at + 21))] = process;
    }
    if (static_cast<int>(by_rank.size()) == ranks) {
      std::vector<pid_t> result;
      for (const auto& [rank, process] : by_rank) result.push_back(process);
      return result;
    }
    std::this_thread::sleep_for(kPoll);
  }
  return {};
}

JobOutcome Job::wait() {
  JobOutcome outcome;
  int status = 0;
  const double deadline = started_ + options_.limit_seconds;
  while (waitpid(launcher_, &status, WNOHANG) == 0) {
    if (now_seconds() > deadline) break;
    std::this_thread::sleep_for(kPoll);
  }
  const double ended = now_seconds();
  outcome.ended_itself = ended - started_ <= options_.limit_seconds;
  double fault_ns = 0.0;
  const bool at_known = static_cast<bool>(std::ifstream(folder_.file("fault")) >> fault_ns);
  outcome.seconds = ended - (at_known ? fault_ns * 1e-9 : started_);
  if (outcome.ended_itself) {
    outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    launcher_ = -1;
  }
  // The launcher's helpers end a moment after it.
  for (int i = 0; i < 200 && !processes().empty(); ++i) std::this_thread::sleep_for(kPoll);
  for (const pid_t process : processes()) {
    outcome.left_behind.push_back("process " + command_line(process) + " " + signs_of(process));
  }
  for (const std::string& file : files_below(memory_)) outcome.left_behind.push_back(file);
  outcome.out = content_of(folder_.file("out"));
  outcome.err = content_of(folder_.file("err"));
  return outcome;
}

Counts count_points(JobOptions options) {
  const TemporaryFolder folder;
  options.environment["F_COUNTS"] = folder.file("counts");
  const JobOutcome outcome = run_job(options);
  Counts counts;
  counts.outcome = outcome;
  for (int rank = 0; rank < options.ranks; ++rank) {
    std::ifstream file(folder.file("counts." + std::to_string(rank)));
    long calls = 0;
    long writes = 0;
    long allocations = 0;
    long peak_kib = 0;
    if (!(file >> calls >> writes >> allocations >> peak_kib))
      throw std::runtime_error("no counts of a rank");
    counts.calls.push_back(calls);
    counts.writes.push_back(writes);
    counts.allocations.push_back(allocations);
    counts.peak_kib.push_back(peak_kib);
  }
  return counts;
}

std::string sha256_of(const std::string& path) {
  if (!std::filesystem::exists(path)) return "";
  return run_program({"sha256sum", path}).out.substr(0, 64);
}

}  // namespace annulus::testing
