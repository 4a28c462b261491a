#include "runtime/transport_monitor.hpp"

#include <chrono>
#include <condition_variable>
#include <memory>
#include <utility>

#include "kernels/error.hpp"
#include "runtime/watchdog.hpp"

namespace annulus {
namespace {

using Seconds = std::chrono::duration<double>;

double now_seconds() {
  return Seconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

bool returns_within(double seconds, std::function<void()> call) {
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
  };
  const auto shared = std::make_shared<Shared>();
  std::thread([shared, call = std::move(call)] {
    call();
    const std::lock_guard lock(shared->mutex);
    shared->done = true;
    shared->changed.notify_all();
  }).detach();
  std::unique_lock lock(shared->mutex);
  return shared->changed.wait_for(lock, Seconds(seconds), [&] { return shared->done; });
}

TransportMonitor::TransportMonitor(Options options)
    : options_(std::move(options)), thread_([this](const std::stop_token& stop) { run(stop); }) {}

TransportMonitor::~TransportMonitor() = default;

TransportMonitor* TransportMonitor::of_process() {
  static TransportMonitor* monitor = []() -> TransportMonitor* {
    const double timeout = Watchdog::of_process().timeout_seconds();
    if (timeout <= 0.0) return nullptr;
    Options options;
    options.timeout_seconds = timeout;
    options.end = [](const std::string& why) { Watchdog::of_process().end_job(why); };
    return new TransportMonitor(std::move(options));  // until the process ends
  }();
  return monitor;
}

void TransportMonitor::add(MonitoredTransport& transport, std::string name) {
  const std::lock_guard lock(mutex_);
  transports_[&transport] = {std::move(name), {}, 0.0};
}

void TransportMonitor::remove(MonitoredTransport& transport) {
  const std::lock_guard lock(mutex_);
  transports_.erase(&transport);
}

void TransportMonitor::run(const std::stop_token& stop) {
  while (!stop.stop_requested()) {
    std::this_thread::sleep_for(Seconds(options_.poll_seconds));
    std::string problem;
    {
      const std::lock_guard lock(mutex_);
      problem = look(now_seconds());
    }
    if (!problem.empty()) return options_.end(problem);
  }
}

std::string TransportMonitor::look(double now) {
  for (auto& [transport, watched] : transports_) {
    const std::string failure = transport->failure();
    if (!failure.empty()) return watched.name + ": " + failure;
    const auto transfer = transport->in_flight();
    if (!transfer || transfer != watched.transfer) {
      watched.transfer = transfer;
      watched.since = now;
      continue;
    }
    if (now - watched.since > options_.timeout_seconds) {
      return fmt::format(
          "{}: a transfer has been in flight for {:.1f} s (--timeout {}); a peer is "
          "gone or silent",
          watched.name, now - watched.since, options_.timeout_seconds);
    }
  }
  return "";
}

}  // namespace annulus
