#include "runtime/nccl_communicator.hpp"

#include <nccl.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/stream.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "runtime/device_window.hpp"
#include "runtime/transport_monitor.hpp"
#include "runtime/watchdog.hpp"

namespace annulus {
namespace {

namespace cuda = kernels::cuda;

constexpr double kTimeoutSeconds = 30.0;  // where no watchdog has another
constexpr double kAbortSeconds = 5.0;

[[noreturn]] void fail(ncclResult_t result, const char* call) {
  throw Error(ExitCode::peer, fmt::format("nccl: {} failed: {} ({})", call,
                                          ncclGetErrorString(result), ncclGetLastError(nullptr)));
}

void check(ncclResult_t result, const char* call) {
  if (result != ncclSuccess && result != ncclInProgress) fail(result, call);
}

#define ANNULUS_CHECK_NCCL(call) check((call), #call)

double timeout_seconds() {
  const double timeout = Watchdog::of_process().timeout_seconds();
  return timeout > 0.0 ? timeout : kTimeoutSeconds;
}

/// Runs a call that waits for peers in a thread of its own, which is left to itself when that takes
/// too long: the error ends the job. `call` owns what it uses.
void wait_for_peers(const char* name, std::function<ncclResult_t()> call) {
  const auto result = std::make_shared<std::atomic<ncclResult_t>>(ncclSuccess);
  const double timeout = timeout_seconds();
  int device = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  const bool ended = returns_within(timeout, [device, result, call = std::move(call)] {
    *result = cudaSetDevice(device) == cudaSuccess ? call() : ncclUnhandledCudaError;
  });
  require(ended, ExitCode::peer, "nccl: {} has not ended after {} s; a peer is gone or silent",
          name, timeout);
  check(*result, name);
}

/// A transfer on its stream: it has begun when what was queued before is done.
struct Flight {
  cuda::OwnedEvent begun = cuda::make_event();
  cuda::OwnedEvent done = cuda::make_event();
};

/// Destroyed normally while healthy, aborted once it failed or while an exception passes: peers
/// that wait in a finalize would never return. A thread watches it meanwhile, since a host that
/// waits for its device learns nothing of NCCL's errors.
class OwnedComm final : public MonitoredTransport {
 public:
  OwnedComm() { ANNULUS_CHECK_CUDA(cudaGetDevice(&device_)); }
  ~OwnedComm() override { release(); }
  OwnedComm(const OwnedComm&) = delete;
  OwnedComm& operator=(const OwnedComm&) = delete;

  ncclComm_t get() const { return comm_; }
  void take(ncclComm_t comm) {
    comm_ = comm;
    monitor_ = TransportMonitor::of_process();
    if (monitor_ != nullptr) monitor_->add(*this, "nccl");
  }
  void add(std::shared_ptr<Flight> flight) {
    const std::lock_guard lock(mutex_);
    flights_.push_back(std::move(flight));
  }

  std::string failure() override {
    ncclResult_t state = ncclSuccess;
    ncclResult_t result = ncclCommGetAsyncError(comm_, &state);
    if (result == ncclSuccess) result = state;
    if (result == ncclSuccess || result == ncclInProgress) return "";
    return fmt::format("{} ({})", ncclGetErrorString(result), ncclGetLastError(nullptr));
  }

  std::optional<std::int64_t> in_flight() override {
    const std::lock_guard lock(mutex_);
    static_cast<void>(cudaSetDevice(device_));  // of this thread
    while (!flights_.empty() && cudaEventQuery(flights_.front()->done.get()) == cudaSuccess) {
      flights_.pop_front();
      ++landed_;
    }
    const bool begun =
        !flights_.empty() && cudaEventQuery(flights_.front()->begun.get()) == cudaSuccess;
    return begun ? std::optional(landed_) : std::nullopt;
  }

 private:
  void release() noexcept {
    if (monitor_ != nullptr) monitor_->remove(*this);
    if (comm_ == nullptr) return;
    try {
      ncclResult_t state = ncclSuccess;
      ANNULUS_CHECK_NCCL(ncclCommGetAsyncError(comm_, &state));
      check(state, "communicator");
      require(std::uncaught_exceptions() == 0, ExitCode::peer, "nccl: an exception passes");
      wait_for_peers("ncclCommFinalize", [comm = comm_] { return ncclCommFinalize(comm); });
      ANNULUS_CHECK_NCCL(ncclCommDestroy(comm_));
    } catch (const Error&) {
      // An abort that hangs is left to itself: the error that led here ends the job.
      static_cast<void>(returns_within(kAbortSeconds,
                                       [comm = comm_] { static_cast<void>(ncclCommAbort(comm)); }));
    }
  }

  ncclComm_t comm_ = nullptr;
  int device_ = 0;
  TransportMonitor* monitor_ = nullptr;
  std::mutex mutex_;  // of what follows
  std::deque<std::shared_ptr<Flight>> flights_;
  std::int64_t landed_ = 0;
};

class NcclExchange final : public Exchange {
 public:
  NcclExchange(ncclComm_t comm, std::shared_ptr<Flight> flight)
      : comm_(comm), flight_(std::move(flight)) {}

  bool test() override {
    check_peers();
    return cuda::is_done(flight_->done.get());
  }

  void wait(Stream stream) override {
    check_peers();
    ANNULUS_CHECK_CUDA(
        cudaStreamWaitEvent(static_cast<cudaStream_t>(stream.handle), flight_->done.get()));
  }

 private:
  void check_peers() const {
    ncclResult_t state = ncclSuccess;
    ANNULUS_CHECK_NCCL(ncclCommGetAsyncError(comm_, &state));
    check(state, "exchange");
  }

  ncclComm_t comm_;
  std::shared_ptr<Flight> flight_;
};

class NcclCommunicator final : public Communicator {
 public:
  explicit NcclCommunicator(std::unique_ptr<Communicator> host)
      : Communicator(Device::cuda), host_(std::move(host)), stream_(cuda::make_transfer_stream()) {
    ncclUniqueId mine{};
    if (host_->rank() == 0) ANNULUS_CHECK_NCCL(ncclGetUniqueId(&mine));
    std::vector<ncclUniqueId> all(static_cast<std::size_t>(host_->size()));
    host_->all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
    const auto made = std::make_shared<ncclComm_t>(nullptr);
    wait_for_peers("ncclCommInitRank",
                   [made, size = host_->size(), id = all.front(), rank = host_->rank()] {
                     return ncclCommInitRank(made.get(), size, id, rank);
                   });
    comm_.take(*made);
  }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }

  std::unique_ptr<Communicator> split(int color, int key) override {
    return std::unique_ptr<Communicator>(new NcclCommunicator(*this, color, key));
  }
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    host_->all_gather(mine, all);
  }
  void all_reduce_sum(std::span<float> values) override { host_->all_reduce_sum(values); }
  std::unique_ptr<Window> expose(std::int64_t bytes, std::int64_t /*granule*/) override {
    return std::make_unique<DeviceWindow>(*host_, bytes);
  }

 protected:
  std::unique_ptr<Exchange> start(std::span<const Send> sends, std::span<const Receive> receives,
                                  Stream stream) override {
    cuda::order(static_cast<cudaStream_t>(stream.handle), {stream_.get()});
    auto flight = std::make_shared<Flight>();
    ANNULUS_CHECK_CUDA(cudaEventRecord(flight->begun.get(), stream_.get()));
    if (connects(sends, receives)) {
      // NCCL meets new peers here; to others it queues a kernel, and waits for nobody.
      wait_for_peers("exchange",
                     [comm = comm_.get(), to = stream_.get(),
                      sends = std::vector<Send>(sends.begin(), sends.end()),
                      receives = std::vector<Receive>(receives.begin(), receives.end())] {
                       return queue(comm, sends, receives, to);
                     });
    } else {
      check(queue(comm_.get(), sends, receives, stream_.get()), "exchange");
    }
    ANNULUS_CHECK_CUDA(cudaEventRecord(flight->done.get(), stream_.get()));
    comm_.add(flight);
    return std::make_unique<NcclExchange>(comm_.get(), std::move(flight));
  }

 private:
  static ncclResult_t queue(ncclComm_t comm, std::span<const Send> sends,
                            std::span<const Receive> receives, cudaStream_t stream) {
    ncclResult_t result = ncclGroupStart();
    for (const Receive& receive : receives) {
      if (result != ncclSuccess) break;
      result = ncclRecv(receive.data, static_cast<std::size_t>(receive.bytes), ncclInt8,
                        receive.peer, comm, stream);
    }
    for (const Send& send : sends) {
      if (result != ncclSuccess) break;
      result = ncclSend(send.data, static_cast<std::size_t>(send.bytes), ncclInt8, send.peer, comm,
                        stream);
    }
    const ncclResult_t end = ncclGroupEnd();
    return result == ncclSuccess ? end : result;
  }

  /// Whether there are peers to which, or from which, no message went before.
  bool connects(std::span<const Send> sends, std::span<const Receive> receives) {
    bool any = false;
    for (const Send& send : sends) any = sent_to_.insert(send.peer).second || any;
    for (const Receive& receive : receives) {
      any = received_from_.insert(receive.peer).second || any;
    }
    return any;
  }

  NcclCommunicator(NcclCommunicator& whole, int color, int key)
      : Communicator(Device::cuda),
        host_(whole.host_->split(color, key)),
        stream_(cuda::make_transfer_stream()) {
    const auto made = std::make_shared<ncclComm_t>(nullptr);
    wait_for_peers("ncclCommSplit", [made, comm = whole.comm_.get(), color, key] {
      return ncclCommSplit(comm, color, key, made.get(), nullptr);
    });
    comm_.take(*made);
  }

  std::unique_ptr<Communicator> host_;
  cuda::OwnedStream stream_;
  std::set<int> sent_to_;
  std::set<int> received_from_;
  OwnedComm comm_;
};

/// NCCL refuses two ranks of one host on one device, unless each says that it is a host of its own;
/// their sockets then meet on the loopback interface.
void let_ranks_share_devices(Communicator& host) {
  const cuda::DeviceIdentity mine = cuda::device_identity();
  std::vector<cuda::DeviceIdentity> all(static_cast<std::size_t>(host.size()));
  host.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  std::sort(all.begin(), all.end());
  if (std::adjacent_find(all.begin(), all.end()) == all.end()) return;
  constexpr int kKeepTheUsers = 0;
  setenv("NCCL_HOSTID", fmt::format("annulus-{}", host.rank()).c_str(), kKeepTheUsers);
  setenv("NCCL_SOCKET_IFNAME", "lo", kKeepTheUsers);
}

}  // namespace

bool has_nccl() { return true; }

const char* nccl_version() {
  static const std::string text = [] {
    int version = 0;
    ANNULUS_CHECK_NCCL(ncclGetVersion(&version));
    return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
  }();
  return text.c_str();
}

std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host) {
  let_ranks_share_devices(host);
  return std::make_unique<NcclCommunicator>(host.split(0, host.rank()));
}

}  // namespace annulus
