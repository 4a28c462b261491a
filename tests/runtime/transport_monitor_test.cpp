// Promise 6: a transport that fails or hangs by itself ends the job, and a hanging abort does not
// keep it.

#include "runtime/transport_monitor.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <thread>

namespace annulus {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

// Stands for NCCL: fails and hangs as told.
class FakeTransport final : public MonitoredTransport {
 public:
  std::string failure() override { return failed ? "remote process exited" : ""; }
  std::optional<std::int64_t> in_flight() override {
    return transfer >= 0 ? std::optional<std::int64_t>(transfer) : std::nullopt;
  }

  std::atomic<bool> failed{false};
  std::atomic<std::int64_t> transfer{-1};
};

struct End {
  std::promise<std::string> why;
  std::future<std::string> future = why.get_future();

  TransportMonitor::Options options() {
    TransportMonitor::Options result;
    result.timeout_seconds = 0.4;
    result.poll_seconds = 0.01;
    result.end = [this](const std::string& text) { why.set_value(text); };
    return result;
  }
  // What the job ended with; empty when it did not within 5 s.
  std::string wait() {
    return future.wait_for(5s) == std::future_status::ready ? future.get() : "";
  }
};

TEST(TransportMonitor, AnErrorEndsTheJob) {
  FakeTransport well;
  FakeTransport transport;
  End end;
  TransportMonitor monitor(end.options());
  monitor.add(well, "other");
  monitor.add(transport, "nccl");
  transport.failed = true;
  EXPECT_EQ(end.wait(), "nccl: remote process exited");
}

TEST(TransportMonitor, ATransferThatDoesNotEndEndsTheJobAfterTheTimeout) {
  FakeTransport transport;
  transport.transfer = 7;
  End end;
  const auto begin = Clock::now();
  TransportMonitor monitor(end.options());
  monitor.add(transport, "nccl");
  const std::string why = end.wait();
  EXPECT_GE(Clock::now() - begin, 400ms);
  EXPECT_TRUE(why.starts_with("nccl: a transfer has been in flight for 0.")) << why;
}

TEST(TransportMonitor, AnAbortThatHangsIsLeftToItself) {
  const auto hang = std::make_shared<std::atomic<bool>>(true);
  const auto begin = Clock::now();
  EXPECT_FALSE(returns_within(0.3, [hang] {
    while (*hang) std::this_thread::sleep_for(1ms);
  }));
  EXPECT_GE(Clock::now() - begin, 300ms);
  *hang = false;
  bool called = false;
  EXPECT_TRUE(returns_within(5.0, [&] { called = true; }));
  EXPECT_TRUE(called);
}

TEST(TransportMonitor, TransfersThatEndAndTransportsThatAreRemovedAreNoFault) {
  FakeTransport busy;
  FakeTransport removed;
  removed.transfer = 1;
  End end;
  TransportMonitor monitor(end.options());
  monitor.add(busy, "nccl");
  monitor.add(removed, "gone");
  for (int i = 0; i < 80; ++i) {  // twice the timeout, each transfer a small part of it
    busy.transfer = i;
    std::this_thread::sleep_for(10ms);
    if (i == 10) monitor.remove(removed);
  }
  EXPECT_EQ(end.future.wait_for(0s), std::future_status::timeout);
}

}  // namespace
}  // namespace annulus
