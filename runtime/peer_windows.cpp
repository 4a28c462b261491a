#include "runtime/peer_windows.hpp"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <span>
#include <utility>

#include "kernels/cuda/check.hpp"
#include "runtime/peer_event.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kLeastCapacity = std::int64_t{1} << 20;
constexpr std::int64_t kAlignment = 256;

cudaStream_t handle_of(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

/// Without CUDA's multi-process service a device goes back and forth between processes, each time
/// saving what all of its multiprocessors hold.
bool ranks_run_together() {
  static const bool together = [] {
    int device = 0;
    int by_service = 0;
    ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
    ANNULUS_CHECK_CUDA(cudaDeviceGetAttribute(&by_service, cudaDevAttrMpsEnabled, device));
    return by_service != 0;
  }();
  return together;
}

/// How other ranks reach the memory of all, which the first rank has, and the events that order the
/// use of one rank's part.
struct MemoryAddress {
  cudaIpcMemHandle_t memory;
  void* direct;
  EventAddress written[2];
  EventAddress read;
};

/// All ranks' memory in this process: its own, or mapped.
class AllMemory {
 public:
  explicit AllMemory(std::int64_t bytes) : owned_(true) {
    // IPC handles exist for plain allocations only, not for those of a stream's pool.
    ANNULUS_CHECK_CUDA(cudaMalloc(&data_, static_cast<std::size_t>(bytes)));
    // A tile reads past the rows that were written: what it masks has to be numbers.
    ANNULUS_CHECK_CUDA(cudaMemset(data_, 0, static_cast<std::size_t>(bytes)));
    ANNULUS_CHECK_CUDA(cudaDeviceSynchronize());
  }
  explicit AllMemory(const MemoryAddress& address) : data_(address.direct) {
    if (is_of_this_process(address.read)) return;
    ANNULUS_CHECK_CUDA(
        cudaIpcOpenMemHandle(&data_, address.memory, cudaIpcMemLazyEnablePeerAccess));
    mapped_ = true;
  }
  ~AllMemory() { owned_ ? free() : unmap(); }
  AllMemory(const AllMemory&) = delete;
  AllMemory& operator=(const AllMemory&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  /// Before the first rank frees it.
  void unmap() {
    if (std::exchange(mapped_, false)) cudaIpcCloseMemHandle(data_);
  }

 private:
  void free() { cudaFree(data_); }

  void* data_ = nullptr;
  bool owned_ = false;
  bool mapped_ = false;
};

/// When another rank has written its part, and read others'.
struct PeerEvents {
  explicit PeerEvents(const MemoryAddress& address)
      : written{RemoteEvent(address.written[0]), RemoteEvent(address.written[1])},
        read(address.read) {}
  RemoteEvent written[2];
  RemoteEvent read;
};

}  // namespace

struct PeerWindows::Memory {
  Memory(Communicator& host, std::int64_t capacity)
      : capacity(capacity),
        written{make_shared_event(), make_shared_event()},
        read(make_shared_event()) {
    MemoryAddress mine{};
    if (host.rank() == 0) {
      all = std::make_unique<AllMemory>(capacity * host.size());
      ANNULUS_CHECK_CUDA(cudaIpcGetMemHandle(&mine.memory, all->data()));
      mine.direct = all->data();
    }
    for (int i = 0; i < 2; ++i) mine.written[i] = address_of(written[i].get());
    mine.read = address_of(read.get());
    std::vector<MemoryAddress> of_all(static_cast<std::size_t>(host.size()));
    host.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(of_all)));
    if (host.rank() != 0) all = std::make_unique<AllMemory>(of_all.front());
    for (int rank = 0; rank < host.size(); ++rank) {
      if (rank != host.rank()) peers.emplace_back(of_all[static_cast<std::size_t>(rank)]);
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::int64_t capacity;  // of each rank
  std::unique_ptr<AllMemory> all;
  // A rank may be at its next fence while another still asks to wait for the last one.
  kernels::cuda::OwnedEvent written[2];
  int fences = 0;
  kernels::cuda::OwnedEvent read;
  std::vector<PeerEvents> peers;
  bool in_use = false;
};

class PeerWindows::SharedWindow final : public Window {
 public:
  SharedWindow(Communicator& host, Communicator& turns, std::shared_ptr<Memory> memory,
               std::int64_t stride)
      : host_(host), turns_(turns), memory_(std::move(memory)), stride_(stride) {
    memory_->in_use = true;
  }
  ~SharedWindow() override { memory_->in_use = false; }
  SharedWindow(const SharedWindow&) = delete;
  SharedWindow& operator=(const SharedWindow&) = delete;

  void* local() override { return memory_->all->data() + host_.rank() * stride_; }
  const void* peer(int peer) const override { return memory_->all->data() + peer * stride_; }
  std::int64_t stride() const override { return stride_; }
  void begin_writes(Stream stream) override {
    wait(stream, memory_->read.get());
    for (const PeerEvents& peer : memory_->peers) wait(stream, peer.read.get());
  }
  void fence(Stream stream) override {
    const int now = memory_->fences++ % 2;
    ANNULUS_CHECK_CUDA(cudaEventRecord(memory_->written[now].get(), handle_of(stream)));
    host_.barrier();  // a wait is for what an event stands for by then
    for (const PeerEvents& peer : memory_->peers) wait(stream, peer.written[now].get());
  }
  // The host waits, not the stream: a process with a waiting stream is given the device, too.
  void take_turn() override {
    if (ranks_run_together() || host_.size() == 1) return;
    const bool first = !std::exchange(began_, true) && host_.rank() == 0;
    if (first) return;
    std::byte word{};
    const Receive receive{(host_.rank() + host_.size() - 1) % host_.size(), &word, 1};
    turns_.exchange({}, {&receive, 1})->wait();
  }
  void end_turn(bool last, Stream stream) override {
    if (ranks_run_together() || host_.size() == 1) return;
    ANNULUS_CHECK_CUDA(cudaStreamSynchronize(handle_of(stream)));
    const int next = (host_.rank() + 1) % host_.size();
    if (last && next == 0) return;
    const std::byte word{1};
    const Send send{next, &word, 1};
    turns_.exchange({&send, 1}, {})->wait();
  }
  void end_reads(Stream stream) override {
    ANNULUS_CHECK_CUDA(cudaEventRecord(memory_->read.get(), handle_of(stream)));
  }

 private:
  static void wait(Stream stream, cudaEvent_t event) {
    ANNULUS_CHECK_CUDA(cudaStreamWaitEvent(handle_of(stream), event));
  }

  Communicator& host_;
  Communicator& turns_;
  std::shared_ptr<Memory> memory_;
  std::int64_t stride_;
  bool began_ = false;  // to take turns
};

PeerWindows::PeerWindows(Communicator& host) : host_(host) {}

PeerWindows::~PeerWindows() = default;

std::unique_ptr<Window> PeerWindows::expose(std::int64_t bytes, std::int64_t granule) {
  if (turns_ == nullptr) turns_ = host_.split(0, host_.rank());
  std::vector<std::int64_t> of_all(static_cast<std::size_t>(host_.size()));
  host_.all_gather(std::as_bytes(std::span(&bytes, 1)), std::as_writable_bytes(std::span(of_all)));
  const std::int64_t unit = std::lcm(granule, kAlignment);
  const std::int64_t most =
      std::max<std::int64_t>(*std::max_element(of_all.begin(), of_all.end()), 1);
  const std::int64_t stride = (most + unit - 1) / unit * unit;
  std::int64_t capacity = kLeastCapacity;
  while (capacity < stride) capacity *= 2;
  // The same choice on all ranks: they came with the same sizes to the same windows.
  for (const std::shared_ptr<Memory>& memory : kept_) {
    if (!memory->in_use && memory->capacity == capacity) {
      return std::make_unique<SharedWindow>(host_, *turns_, memory, stride);
    }
  }
  kept_.push_back(std::make_shared<Memory>(host_, capacity));
  return std::make_unique<SharedWindow>(host_, *turns_, kept_.back(), stride);
}

void PeerWindows::close() {
  for (const std::shared_ptr<Memory>& memory : kept_) {
    memory->all->unmap();
    memory->peers.clear();
  }
  host_.barrier();
  kept_.clear();
}

void PeerWindows::leak() noexcept {
  for (std::shared_ptr<Memory>& memory : kept_) {
    static_cast<void>(new std::shared_ptr<Memory>(std::move(memory)));
  }
  kept_.clear();
}

}  // namespace annulus
