#pragma once

#include "sharding/execution.hpp"

namespace annulus {

/// Collects what an execution costs besides its computation, and adds it to the caller's report.
class ExecutionAccounting {
 public:
  /// What is recorded meanwhile is done by `stream` where the problem lies on a device.
  ExecutionAccounting(const Communicator& ranks, const ExecuteOptions& options,
                      const AttentionProblem& problem, Stream stream)
      : ranks_(ranks), options_(options), bytes_before_(ranks.bytes_sent()) {
    if (options_.recorder != nullptr) {
      clock_before_ = options_.recorder->follow({problem.q.device, stream});
    }
  }
  ~ExecutionAccounting() {
    if (options_.recorder != nullptr) options_.recorder->follow(clock_before_);
  }
  ExecutionAccounting(const ExecutionAccounting&) = delete;
  ExecutionAccounting& operator=(const ExecutionAccounting&) = delete;

  double& exposed_seconds() { return exposed_seconds_; }
  void add_bytes_in_place(std::int64_t bytes) { bytes_in_place_ += bytes; }
  /// `buffer_bytes`: the most that the execution held at a time.
  void close(std::int64_t buffer_bytes) {
    if (options_.report == nullptr) return;
    options_.report->exposed_seconds += exposed_seconds_;
    options_.report->bytes_sent += ranks_.bytes_sent() - bytes_before_;
    options_.report->bytes_in_place += bytes_in_place_;
    options_.report->buffer_bytes += buffer_bytes;
  }

 private:
  const Communicator& ranks_;
  const ExecuteOptions& options_;
  std::int64_t bytes_before_;
  double exposed_seconds_ = 0.0;
  std::int64_t bytes_in_place_ = 0;
  StageRecorder::Clock clock_before_;
};

}  // namespace annulus
