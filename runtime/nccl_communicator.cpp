#include "runtime/nccl_communicator.hpp"

#include <nccl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/stream.hpp"
#include "kernels/error.hpp"
#include "runtime/device_window.hpp"

namespace annulus {
namespace {

namespace cuda = kernels::cuda;

constexpr std::chrono::seconds kTimeout{30};  // the reliability promise for a silent peer

[[noreturn]] void fail(ncclResult_t result, const char* call) {
  throw Error(ExitCode::peer, fmt::format("nccl: {} failed: {} ({})", call,
                                          ncclGetErrorString(result), ncclGetLastError(nullptr)));
}

void check(ncclResult_t result, const char* call) {
  if (result != ncclSuccess && result != ncclInProgress) fail(result, call);
}

#define ANNULUS_CHECK_NCCL(call) check((call), #call)

/// A non-blocking communicator's calls return at once; it is usable again when this returns.
void settle(ncclComm_t comm, const char* call) {
  const auto deadline = std::chrono::steady_clock::now() + kTimeout;
  ncclResult_t state = ncclInProgress;
  while (state == ncclInProgress) {
    ANNULUS_CHECK_NCCL(ncclCommGetAsyncError(comm, &state));
    check(state, call);
    if (state != ncclInProgress) return;
    require(std::chrono::steady_clock::now() < deadline, ExitCode::peer,
            "nccl: {} has not ended after {} s; a peer is gone or silent", call, kTimeout.count());
    std::this_thread::yield();
  }
}

ncclConfig_t non_blocking() {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  return config;
}

/// Destroyed normally while healthy, aborted once it failed or while an exception passes: peers
/// that wait in a finalize would never return.
class OwnedComm {
 public:
  OwnedComm() = default;
  ~OwnedComm() { release(); }
  OwnedComm(const OwnedComm&) = delete;
  OwnedComm& operator=(const OwnedComm&) = delete;

  ncclComm_t* out() { return &comm_; }
  ncclComm_t get() const { return comm_; }

 private:
  void release() noexcept {
    if (comm_ == nullptr) return;
    try {
      ncclResult_t state = ncclSuccess;
      ANNULUS_CHECK_NCCL(ncclCommGetAsyncError(comm_, &state));
      check(state, "communicator");
      require(std::uncaught_exceptions() == 0, ExitCode::peer, "nccl: an exception passes");
      ANNULUS_CHECK_NCCL(ncclCommFinalize(comm_));
      settle(comm_, "ncclCommFinalize");
      ANNULUS_CHECK_NCCL(ncclCommDestroy(comm_));
    } catch (const Error&) {
      ncclCommAbort(comm_);
    }
  }

  ncclComm_t comm_ = nullptr;
};

class NcclExchange final : public Exchange {
 public:
  NcclExchange(ncclComm_t comm, cudaStream_t stream) : comm_(comm), done_(cuda::make_event()) {
    ANNULUS_CHECK_CUDA(cudaEventRecord(done_.get(), stream));
  }

  bool test() override {
    check_peers();
    return cuda::is_done(done_.get());
  }

  void wait(Stream stream) override {
    check_peers();
    ANNULUS_CHECK_CUDA(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream.handle), done_.get()));
  }

 private:
  void check_peers() const {
    ncclResult_t state = ncclSuccess;
    ANNULUS_CHECK_NCCL(ncclCommGetAsyncError(comm_, &state));
    check(state, "exchange");
  }

  ncclComm_t comm_;
  cuda::OwnedEvent done_;
};

class NcclCommunicator final : public Communicator {
 public:
  explicit NcclCommunicator(std::unique_ptr<Communicator> host)
      : Communicator(Device::cuda), host_(std::move(host)), stream_(cuda::make_transfer_stream()) {
    ncclUniqueId mine{};
    if (host_->rank() == 0) ANNULUS_CHECK_NCCL(ncclGetUniqueId(&mine));
    std::vector<ncclUniqueId> all(static_cast<std::size_t>(host_->size()));
    host_->all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
    ncclConfig_t config = non_blocking();
    ANNULUS_CHECK_NCCL(
        ncclCommInitRankConfig(comm_.out(), host_->size(), all.front(), host_->rank(), &config));
    settle(comm_.get(), "ncclCommInitRankConfig");
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
    cuda::order(static_cast<cudaStream_t>(stream.handle), stream_.get());
    ANNULUS_CHECK_NCCL(ncclGroupStart());
    for (const Receive& receive : receives) {
      ANNULUS_CHECK_NCCL(ncclRecv(receive.data, static_cast<std::size_t>(receive.bytes), ncclInt8,
                                  receive.peer, comm_.get(), stream_.get()));
    }
    for (const Send& send : sends) {
      ANNULUS_CHECK_NCCL(ncclSend(send.data, static_cast<std::size_t>(send.bytes), ncclInt8,
                                  send.peer, comm_.get(), stream_.get()));
    }
    ANNULUS_CHECK_NCCL(ncclGroupEnd());
    settle(comm_.get(), "ncclGroupEnd");  // queued; only then may an event follow
    return std::make_unique<NcclExchange>(comm_.get(), stream_.get());
  }

 private:
  NcclCommunicator(NcclCommunicator& whole, int color, int key)
      : Communicator(Device::cuda),
        host_(whole.host_->split(color, key)),
        stream_(cuda::make_transfer_stream()) {
    ncclConfig_t config = non_blocking();
    ANNULUS_CHECK_NCCL(ncclCommSplit(whole.comm_.get(), color, key, comm_.out(), &config));
    settle(whole.comm_.get(), "ncclCommSplit");
    settle(comm_.get(), "ncclCommSplit");
  }

  std::unique_ptr<Communicator> host_;
  cuda::OwnedStream stream_;
  OwnedComm comm_;
};

/// NCCL refuses two ranks of one host on one device, unless each says that it is a host of its own;
/// their sockets then meet on the loopback interface.
void let_ranks_share_devices(Communicator& host) {
  std::array<char, 128> mine{};
  int device = 0;
  cudaDeviceProp properties{};
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  ANNULUS_CHECK_CUDA(cudaGetDeviceProperties(&properties, device));
  std::memcpy(mine.data(), properties.uuid.bytes, sizeof(properties.uuid.bytes));
  std::vector<std::array<char, 128>> all(static_cast<std::size_t>(host.size()));
  host.all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)));
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
