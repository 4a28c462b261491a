#pragma once

#include <sys/types.h>

#include <map>
#include <string>
#include <vector>

#include "launch/program.hpp"

namespace annulus::testing {

/// A job of several ranks to be harmed.
struct JobOptions {
  int ranks = 4;
  std::vector<std::string> arguments;  // of annulus
  /// Arguments of rank 0 where they differ from those of the others.
  std::vector<std::string> first_rank_arguments;
  std::map<std::string, std::string> environment;  // of the ranks, F_* among them
  double limit_seconds = 90.0;                     // then it is killed, and the test fails
  std::vector<std::string> wrapper;                // stands before the launcher
};

struct JobOutcome {
  int exit_code = -1;
  double seconds = 0.0;  // from the fault where that is known, else from the start
  bool ended_itself = false;
  std::string out;
  std::string err;
  /// What must not be there: processes, shared memory, session folders, one line each.
  std::vector<std::string> left_behind;
};

/// Runs annulus under the launcher with the shim preloaded, its shared memory and session folders
/// in a place of their own, and looks for what is left when it has ended. With one rank there is
/// no launcher.
class Job {
 public:
  explicit Job(const JobOptions& options);
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  pid_t launcher() const { return launcher_; }
  /// Processes of the ranks, by rank, once all of them run; empty when the job ended before.
  std::vector<pid_t> wait_for_ranks(int ranks) const;
  /// Starts the clock of JobOutcome::seconds again.
  void mark_fault();
  JobOutcome wait();

 private:
  std::vector<pid_t> processes() const;

  JobOptions options_;
  TemporaryFolder folder_;  // outputs of the processes
  std::string memory_;      // where shared memory is made
  std::string token_;       // in the environment of each process
  pid_t launcher_ = -1;
  double started_ = 0.0;
};

inline JobOutcome run_job(const JobOptions& options) { return Job(options).wait(); }

/// Calls, file changes and large allocations of each rank in a run without a fault.
struct Counts {
  std::vector<long> calls;
  std::vector<long> writes;
  std::vector<long> allocations;
  std::vector<long> peak_kib;  // memory resident at most
  JobOutcome outcome;
};
Counts count_points(JobOptions options);

/// SHA-256 of a file's bytes in hexadecimal; empty when there is no file.
std::string sha256_of(const std::string& path);

}  // namespace annulus::testing
