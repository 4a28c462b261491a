#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "reliability/job.hpp"

namespace annulus::testing {

/// The deadline that tests of a missed one give with --timeout.
inline constexpr double kTimeoutSeconds = 3.0;
/// The program's own: a machine full of other work must not end the jobs of the other tests.
inline constexpr double kUnhurriedSeconds = 30.0;

/// True for the whole matrix (ANNULUS_FAULT_MATRIX=1), false for the part that every check runs.
bool whole_matrix();

/// Up to `quick` or `whole` points, by the mode, evenly spread over 1..last with both ends.
std::vector<long> points(long last, int quick, int whole);

/// Calls `check` for every index below `count`, several at a time: a job mostly waits, for its
/// start or for a deadline. ANNULUS_FAULT_JOBS says how many; expectations may fail in any of them.
void side_by_side(std::size_t count, const std::function<void(std::size_t)>& check);

/// Causal ring attention over the sample file on 4 ranks, written to `output`.
JobOptions ring_job(const std::string& output, double timeout_seconds = kUnhurriedSeconds);

/// A digest of what all datasets under /output hold; empty when there is no such file, "damaged"
/// when it cannot be read. The report among the attributes has times, so bytes of files differ.
std::string results_of(const std::string& path);

/// Writes a float32 dataset of zeros; `chunked` claims the size without taking the space.
void write_zeros(const std::string& path, const std::string& dataset,
                 const std::vector<unsigned long long>& shape, bool chunked = false);

struct Reference {
  Counts counts;
  std::string results;
};
/// ring_job without a fault, once for all tests.
const Reference& reference();

/// True when standard error has a match of the regular expression.
bool says(const JobOutcome& outcome, const std::string& pattern);

/// No process, shared memory or session folder is left, and the job ended by itself.
void expect_clean_end(const JobOutcome& outcome, const std::string& what);

/// Counts cases and keeps the slowest, for the table of promises; prints them at the end. Cases may
/// run side by side.
class Figures {
 public:
  explicit Figures(std::string promise) : promise_(std::move(promise)) {}
  ~Figures();
  Figures(const Figures&) = delete;
  Figures& operator=(const Figures&) = delete;

  void add(double seconds);
  void note(const std::string& text) { notes_ += "; " + text; }

 private:
  std::mutex mutex_;
  std::string promise_;
  std::string notes_;
  int cases_ = 0;
  double slowest_ = 0.0;
};

}  // namespace annulus::testing
