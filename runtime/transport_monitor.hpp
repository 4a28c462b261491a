#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

namespace annulus {

/// A transport that works while the program does something else, such as NCCL on a GPU: what it
/// tells of itself. Any thread may ask.
class MonitoredTransport {
 public:
  virtual ~MonitoredTransport() = default;
  /// The error that the transport met by itself; empty while it is well.
  virtual std::string failure() = 0;
  /// Number of the transfer that has begun and not ended; nothing when none has.
  virtual std::optional<std::int64_t> in_flight() = 0;
};

/// Ends a job over a transport that fails or hangs while its ranks wait for their devices, where no
/// call of MPI shows it. A thread asks each transport; on an error, or when one transfer is in
/// flight for longer than the timeout, the job ends. Nothing is aborted before: the program may be
/// inside the transport, and the end of the process frees what waits on a device.
class TransportMonitor {
 public:
  struct Options {
    double timeout_seconds = 30.0;
    double poll_seconds = 0.1;
    /// Ends the job, given what was wrong; called once, without a lock.
    std::function<void(const std::string&)> end;
  };

  explicit TransportMonitor(Options options);
  ~TransportMonitor();
  TransportMonitor(const TransportMonitor&) = delete;
  TransportMonitor& operator=(const TransportMonitor&) = delete;

  /// The one of this process, which ends the job with 75; null without a watchdog.
  static TransportMonitor* of_process();

  void add(MonitoredTransport& transport, std::string name);
  /// Afterwards the transport is not asked any more.
  void remove(MonitoredTransport& transport);

 private:
  struct Watched {
    std::string name;
    std::optional<std::int64_t> transfer;
    double since = 0.0;
  };

  void run(const std::stop_token& stop);
  std::string look(double now);

  Options options_;
  std::mutex mutex_;  // of the transports
  std::map<MonitoredTransport*, Watched> transports_;
  std::jthread thread_;
};

/// Runs `call`, such as an abort that may hang, in a thread of its own and waits for at most
/// `seconds`; false when it goes on, which it then does for ever.
bool returns_within(double seconds, std::function<void()> call);

}  // namespace annulus
