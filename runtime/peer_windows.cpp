#include "runtime/peer_windows.hpp"

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

#include "kernels/cuda/check.hpp"
#include "runtime/peer_event.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kLeastCapacity = std::int64_t{1} << 20;

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

/// How other ranks reach one rank's memory, and the events that order its use.
struct MemoryAddress {
  cudaIpcMemHandle_t memory;
  void* direct;
  EventAddress written;
  EventAddress read;
};

/// Another rank's memory.
class MappedMemory {
 public:
  explicit MappedMemory(const MemoryAddress& address)
      : data_(address.direct), written_(address.written), read_(address.read) {
    if (is_of_this_process(address.written)) return;
    ANNULUS_CHECK_CUDA(
        cudaIpcOpenMemHandle(&data_, address.memory, cudaIpcMemLazyEnablePeerAccess));
    mapped_ = true;
  }
  ~MappedMemory() {
    if (mapped_) cudaIpcCloseMemHandle(data_);
  }
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  const void* data() const { return data_; }
  cudaEvent_t written() const { return written_.get(); }
  cudaEvent_t read() const { return read_.get(); }

 private:
  void* data_;
  bool mapped_ = false;
  RemoteEvent written_;
  RemoteEvent read_;
};

}  // namespace

struct PeerWindows::Memory {
  Memory(Communicator& host, std::int64_t capacity)
      : capacity(capacity), written(make_shared_event()), read(make_shared_event()) {
    // IPC handles exist for plain allocations only, not for those of a stream's pool.
    ANNULUS_CHECK_CUDA(cudaMalloc(&own, static_cast<std::size_t>(capacity)));
    // A tile reads past the rows that were written: what it masks has to be numbers.
    ANNULUS_CHECK_CUDA(cudaMemset(own, 0, static_cast<std::size_t>(capacity)));
    ANNULUS_CHECK_CUDA(cudaDeviceSynchronize());
    MemoryAddress mine{};
    ANNULUS_CHECK_CUDA(cudaIpcGetMemHandle(&mine.memory, own));
    mine.direct = own;
    mine.written = address_of(written.get());
    mine.read = address_of(read.get());
    std::vector<MemoryAddress> all(static_cast<std::size_t>(host.size()));
    host.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
    for (int rank = 0; rank < host.size(); ++rank) {
      const bool other = rank != host.rank();
      peers.push_back(other ? std::make_unique<MappedMemory>(all[static_cast<std::size_t>(rank)])
                            : nullptr);
    }
  }
  ~Memory() { cudaFree(own); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::int64_t capacity;
  void* own = nullptr;
  kernels::cuda::OwnedEvent written;
  kernels::cuda::OwnedEvent read;
  std::vector<std::unique_ptr<MappedMemory>> peers;  // by rank; none for this one
  bool in_use = false;
};

class PeerWindows::SharedWindow final : public Window {
 public:
  SharedWindow(Communicator& host, Communicator& turns, std::shared_ptr<Memory> memory)
      : host_(host), turns_(turns), memory_(std::move(memory)) {
    memory_->in_use = true;
  }
  ~SharedWindow() override { memory_->in_use = false; }
  SharedWindow(const SharedWindow&) = delete;
  SharedWindow& operator=(const SharedWindow&) = delete;

  void* local() override { return memory_->own; }
  const void* peer(int peer) const override {
    const auto& mapped = memory_->peers.at(static_cast<std::size_t>(peer));
    return mapped == nullptr ? memory_->own : mapped->data();
  }
  void begin_writes(Stream stream) override { wait_for_all(stream, &MappedMemory::read); }
  void fence(Stream stream) override {
    ANNULUS_CHECK_CUDA(cudaEventRecord(memory_->written.get(), handle_of(stream)));
    host_.barrier();  // a wait is for what an event stands for by then
    wait_for_all(stream, &MappedMemory::written);
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
  void wait_for_all(Stream stream, cudaEvent_t (MappedMemory::*event)() const) const {
    for (const auto& mapped : memory_->peers) {
      if (mapped == nullptr) continue;
      ANNULUS_CHECK_CUDA(cudaStreamWaitEvent(handle_of(stream), (*mapped.*event)()));
    }
  }

  Communicator& host_;
  Communicator& turns_;
  std::shared_ptr<Memory> memory_;
  bool began_ = false;  // to take turns
};

PeerWindows::PeerWindows(Communicator& host) : host_(host) {}

PeerWindows::~PeerWindows() = default;

std::unique_ptr<Window> PeerWindows::expose(std::int64_t bytes) {
  if (turns_ == nullptr) turns_ = host_.split(0, host_.rank());
  std::vector<std::int64_t> of_all(static_cast<std::size_t>(host_.size()));
  host_.all_gather(std::as_bytes(std::span(&bytes, 1)), std::as_writable_bytes(std::span(of_all)));
  std::int64_t capacity = kLeastCapacity;
  while (capacity < *std::max_element(of_all.begin(), of_all.end())) capacity *= 2;
  // The same choice on all ranks: they came with the same sizes to the same windows.
  for (const std::shared_ptr<Memory>& memory : kept_) {
    if (!memory->in_use && memory->capacity == capacity) {
      return std::make_unique<SharedWindow>(host_, *turns_, memory);
    }
  }
  kept_.push_back(std::make_shared<Memory>(host_, capacity));
  return std::make_unique<SharedWindow>(host_, *turns_, kept_.back());
}

void PeerWindows::close() {
  for (const std::shared_ptr<Memory>& memory : kept_) memory->peers.clear();
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
