#pragma once

#include <atomic>

namespace annulus {

/// A pair's backward takes five products where its forward takes two.
inline constexpr double kBackwardWork = 2.5;

/// How much of its attention this process has done, in kept (query, key) pairs of all heads, those
/// of the backward counted kBackwardWork times. The
/// CPU's kernels count while they run; device kernels run behind the host and do not count.
class WorkMeter {
 public:
  /// More work is to come.
  void expect(double pairs) noexcept { expected_.fetch_add(pairs); }
  void advance(double pairs) noexcept { done_.fetch_add(pairs, std::memory_order_relaxed); }

  double expected() const noexcept { return expected_; }
  double done() const noexcept { return done_; }

 private:
  std::atomic<double> expected_{0.0};
  std::atomic<double> done_{0.0};
};

/// The meter of this process.
inline WorkMeter& work_meter() {
  static WorkMeter meter;
  return meter;
}

}  // namespace annulus
