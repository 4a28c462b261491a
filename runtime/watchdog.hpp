#pragma once

#include <memory>
#include <string_view>

#include "runtime/mpi_communicator.hpp"

namespace annulus {

/// Ends the job when this rank waits in vain. A thread of the process compares the step that the
/// operation log shows with a deadline; ranks that wait long ask those they wait for, whose threads
/// answer. After `timeout` without progress anywhere along the chain it prints rank, host, step,
/// peer, bytes outstanding and the suspect, dumps the last steps and aborts all ranks with 75.
class Watchdog {
 public:
  /// The one of this process; it lives until the process ends.
  static Watchdog& of_process();

  /// Seconds, 31 years.
  static constexpr double kLongestTimeout = 1e9;

  /// Starts the thread, before MPI if it shall cover MPI's own start. Later calls change the
  /// deadline only, and only before connect(). Throws usage unless above 0 and at most the longest.
  void start(double timeout_seconds);

  /// Lets `ranks` ask each other; nothing unless started, which all ranks must be alike.
  /// Collective. Without MPI_THREAD_MULTIPLE nothing is asked, and every wait has the plain
  /// deadline.
  void connect(MpiHandle ranks);
  /// The deadline; 0 before start().
  double timeout_seconds() const;
  /// Ends the job as a missed deadline does: rank, host, `why`, phase and step, the last steps, 75.
  [[noreturn]] void end_job(std::string_view why);

  /// Ends that when all ranks have come here, before MPI ends. Collective; does not throw. The
  /// plain deadline goes on for what is waited for later.
  void disconnect() noexcept;

 private:
  Watchdog();
  ~Watchdog() = delete;

  class Thread;
  Thread* thread_;
};

}  // namespace annulus
