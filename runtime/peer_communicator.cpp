#include "runtime/peer_communicator.hpp"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/cuda/stream.hpp"
#include "kernels/cuda/strided_copy.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "runtime/device_window.hpp"
#include "runtime/peer_inbox.hpp"
#include "runtime/peer_outbox.hpp"
#include "runtime/peer_windows.hpp"

// A message goes: the sender copies it into a slot on its own device and sends the slot's address
// over the host; the receiver pulls it with its copy engine and sends back the event after which
// the slot is free. The host never waits for a device.
namespace annulus {
namespace {

namespace cuda = kernels::cuda;

constexpr std::int64_t kAlignment = 256;

std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

template <typename Message>
std::int64_t packed_bytes(const std::vector<Message>& messages) {
  std::int64_t bytes = 0;
  for (const Message& message : messages) bytes += aligned(message.bytes);
  return bytes;
}

/// Bytes of message `i` and of those after it that follow it in its allocation as they do in a
/// slot; `i` is then behind them.
template <typename Message>
std::int64_t take_piece(const std::vector<Message>& messages, std::size_t& i) {
  const auto* const begin = static_cast<const std::byte*>(messages[i].data);
  std::int64_t bytes = messages[i].bytes;
  for (++i; i < messages.size() && messages[i].same_allocation && bytes % kAlignment == 0 &&
            messages[i].data == begin + bytes;
       ++i) {
    bytes += messages[i].bytes;
  }
  return bytes;
}

void pack_rows(const Send& send, void* to, cudaStream_t stream) {
  const Shape shape{send.rows, send.bytes / send.rows};
  const ConstTensorView from(send.data, DType::u8, shape, {send.pitch, 1}, Device::cuda);
  cuda::strided_copy(from, TensorView(to, DType::u8, shape, Device::cuda), stream);
}

template <typename Message>
std::map<int, std::vector<Message>> by_peer(const std::vector<Message>& messages) {
  std::map<int, std::vector<Message>> groups;
  for (const Message& message : messages) groups[message.peer].push_back(message);
  return groups;
}

/// A launch returns when its kernel is done, at the user's wish.
bool launches_wait() {
  static const bool wait = [] {
    const char* const value = std::getenv("CUDA_LAUNCH_BLOCKING");
    return value != nullptr && std::string_view(value) != "0";
  }();
  return wait;
}

/// The address of a filled slot on its way to the receiver.
struct Outbound {
  SlotAddress address{};
  std::unique_ptr<Exchange> announced;
};

/// Messages of one peer on their way in.
struct Inbound {
  int peer = 0;
  std::vector<Receive> receives;
  PeerInbox::Expected expected{};
  SlotAddress address{};
  std::unique_ptr<Exchange> announced;
};

class PeerExchange final : public Exchange {
 public:
  PeerExchange(PeerInbox& inbox, cudaStream_t pull_stream)
      : inbox_(inbox), pull_stream_(pull_stream), done_(cuda::make_event()) {}

  void announce(Communicator& host, const PeerSlot& slot, std::int64_t bytes,
                std::int64_t promised) {
    outbound_.push_back(std::make_unique<Outbound>());
    Outbound& to = *outbound_.back();
    to.address = slot.address(bytes);
    to.address.promised = promised;
    const Send send{slot.peer(), &to.address, sizeof(to.address)};
    to.announced = host.exchange({&send, 1}, {});
  }

  void expect(Communicator& host, int peer, std::vector<Receive> receives) {
    inbound_.push_back(std::make_unique<Inbound>());
    Inbound& from = *inbound_.back();
    from.peer = peer;
    from.receives = std::move(receives);
    from.expected = inbox_.expect(peer, packed_bytes(from.receives));
    const Receive receive{peer, &from.address, sizeof(from.address)};
    from.announced = host.exchange({}, {&receive, 1});
  }

  void join(std::unique_ptr<Exchange> far) { far_ = std::move(far); }

  bool test() override {
    for (; pulled_ < inbound_.size(); ++pulled_) {
      if (!inbound_[pulled_]->announced->test()) return false;
      pull(*inbound_[pulled_]);
    }
    record_done();
    for (const std::unique_ptr<Outbound>& to : outbound_) {
      if (!to->announced->test()) return false;
    }
    return (far_ == nullptr || far_->test()) && cuda::is_done(done_.get());
  }

  void wait(Stream stream) override {
    for (; pulled_ < inbound_.size(); ++pulled_) {
      inbound_[pulled_]->announced->wait();
      pull(*inbound_[pulled_]);
    }
    record_done();
    for (const std::unique_ptr<Outbound>& to : outbound_) to->announced->wait();
    if (far_ != nullptr) far_->wait(stream);
    ANNULUS_CHECK_CUDA(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream.handle), done_.get()));
  }

  bool may_follow_kernel() const override {
    return far_ == nullptr && !launches_wait() &&
           std::all_of(inbound_.begin(), inbound_.end(), [](const std::unique_ptr<Inbound>& from) {
             return from->expected.mapped;  // to map a slot may take as long as a kernel runs
           });
  }

 private:
  void pull(const Inbound& from) {
    require(from.address.bytes == packed_bytes(from.receives), ExitCode::peer,
            "exchange: expected {} bytes from rank {}, got {}", packed_bytes(from.receives),
            from.peer, from.address.bytes);
    const MappedSlot& slot = inbox_.open(from.peer, from.expected, from.address);
    ANNULUS_CHECK_CUDA(cudaStreamWaitEvent(pull_stream_, slot.full()));
    const std::byte* data = slot.data();
    for (std::size_t i = 0; i < from.receives.size();) {
      void* const to = from.receives[i].data;
      const std::int64_t piece = take_piece(from.receives, i);
      cuda::copy_by_engine(to, data, static_cast<std::size_t>(piece), pull_stream_);
      data += aligned(piece);
    }
    inbox_.give_back(from.peer, from.address, slot, pull_stream_);
  }

  void record_done() {
    if (std::exchange(recorded_, true)) return;
    ANNULUS_CHECK_CUDA(cudaEventRecord(done_.get(), pull_stream_));
  }

  PeerInbox& inbox_;
  cudaStream_t pull_stream_;
  std::vector<std::unique_ptr<Inbound>> inbound_;
  std::vector<std::unique_ptr<Outbound>> outbound_;
  std::unique_ptr<Exchange> far_;
  cuda::OwnedEvent done_;
  std::size_t pulled_ = 0;  // of inbound_, in order
  bool recorded_ = false;
};

/// Where the ranks' devices are: copies within a device may need multiprocessors, those between
/// devices never do; memory of the same device is read as if it were one's own.
struct Placement {
  Placement(Communicator& host, PeerDevices devices, bool has_far) {
    const cuda::DeviceIdentity mine = cuda::device_identity();
    std::vector<cuda::DeviceIdentity> all(static_cast<std::size_t>(host.size()));
    host.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
    std::sort(all.begin(), all.end());
    if (has_far) return;
    const bool apart =
        devices == PeerDevices::apart || std::adjacent_find(all.begin(), all.end()) == all.end();
    if (all.front() == all.back() && !apart) reach = Communicator::Reach::everybody;
    if (apart) {
      carrier = Communicator::Carrier::copy_engine;
    }
  }
  Communicator::Carrier carrier = Communicator::Carrier::kernels;
  Communicator::Reach reach = Communicator::Reach::nobody;
};

class PeerCommunicator final : public Communicator {
 public:
  static std::unique_ptr<Communicator> make(std::unique_ptr<Communicator> host, PeerDevices devices,
                                            std::unique_ptr<Communicator> far) {
    const Placement placement(*host, devices, far != nullptr);
    return std::unique_ptr<Communicator>(
        new PeerCommunicator(placement, devices, std::move(host), std::move(far)));
  }
  ~PeerCommunicator() override { release(); }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  std::unique_ptr<Communicator> split(int color, int key) override {
    std::unique_ptr<Communicator> far;
    if (far_ != nullptr) far = far_->split(color, key);
    return make(host_->split(color, key), devices_, std::move(far));
  }
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    host_->all_gather(mine, all);
  }
  void all_reduce_sum(std::span<float> values) override { host_->all_reduce_sum(values); }
  std::unique_ptr<Window> expose(std::int64_t bytes, std::int64_t granule) override {
    if (reach() == Reach::everybody) return windows_.expose(bytes, granule);
    return std::make_unique<DeviceWindow>(*host_, bytes);
  }

 protected:
  std::unique_ptr<Exchange> start(std::span<const Send> sends, std::span<const Receive> receives,
                                  Stream stream) override;

 private:
  PeerCommunicator(const Placement& placement, PeerDevices devices,
                   std::unique_ptr<Communicator> host, std::unique_ptr<Communicator> far)
      : Communicator(Device::cuda, placement.carrier, placement.reach),
        devices_(devices),
        host_(std::move(host)),
        words_(host_->split(0, host_->rank())),
        far_(std::move(far)),
        push_stream_(cuda::make_transfer_stream()),
        pull_stream_(cuda::make_transfer_stream()),
        outbox_(*words_, carrier() == Carrier::copy_engine),
        inbox_(*words_),
        windows_(*host_) {
    const std::unique_ptr<Window> window = host_->expose(1);
    for (int peer = 0; peer < size(); ++peer) near_.push_back(window->peer(peer) != nullptr);
  }

  /// Messages of other nodes; the rest goes to `near`.
  template <typename Message>
  std::vector<Message> far_of(std::span<const Message> messages, std::vector<Message>& near) const;
  void push(const std::vector<Send>& sends, cudaStream_t stream, PeerExchange& exchange);
  void release() noexcept;

  PeerDevices devices_;
  std::unique_ptr<Communicator> host_;   // carries the addresses of slots
  std::unique_ptr<Communicator> words_;  // carries them back: the two are not in step
  std::unique_ptr<Communicator> far_;
  std::vector<bool> near_;  // by rank: on this node
  cuda::OwnedStream push_stream_;
  cuda::OwnedStream pull_stream_;
  PeerOutbox outbox_;
  PeerInbox inbox_;
  PeerWindows windows_;
};

template <typename Message>
std::vector<Message> PeerCommunicator::far_of(std::span<const Message> messages,
                                              std::vector<Message>& near) const {
  std::vector<Message> far;
  for (const Message& message : messages) {
    const bool on_node = near_[static_cast<std::size_t>(message.peer)];
    require(on_node || far_ != nullptr, ExitCode::usage,
            "peer: rank {} is on another node than rank {}; use --transport auto or nccl",
            message.peer, rank());
    (on_node ? near : far).push_back(message);
  }
  return far;
}

std::unique_ptr<Exchange> PeerCommunicator::start(std::span<const Send> sends,
                                                  std::span<const Receive> receives,
                                                  Stream stream) {
  std::vector<Send> near_sends;
  std::vector<Receive> near_receives;
  const std::vector<Send> far_sends = far_of(sends, near_sends);
  const std::vector<Receive> far_receives = far_of(receives, near_receives);
  auto exchange = std::make_unique<PeerExchange>(inbox_, pull_stream_.get());
  if (!far_sends.empty() || !far_receives.empty()) {
    exchange->join(far_->exchange(far_sends, far_receives, stream));
  }
  const auto caller = static_cast<cudaStream_t>(stream.handle);
  // Copies within a device are fast because they take multiprocessors: a kernel that holds all of
  // them and waits for a peer, which waits for this copy, has to come after it.
  const bool in_turn = carrier() == Carrier::copy_engine;
  cudaStream_t packs = in_turn ? caller : push_stream_.get();
  if (!in_turn) cuda::order(caller, {packs});
  for (const auto& [peer, messages] : by_peer(near_sends)) push(messages, packs, *exchange);
  for (const auto& [peer, messages] : by_peer(near_receives)) {
    exchange->expect(*host_, peer, messages);
  }
  // What is received into is no longer read by then, and what is sent has been packed.
  cuda::order(packs, {pull_stream_.get()});
  return exchange;
}

void PeerCommunicator::push(const std::vector<Send>& sends, cudaStream_t stream,
                            PeerExchange& exchange) {
  const std::int64_t bytes = packed_bytes(sends);
  PeerSlot& slot = outbox_.take(sends.front().peer, bytes, stream);
  auto* data = static_cast<std::byte*>(slot.data());
  for (std::size_t i = 0; i < sends.size();) {
    if (sends[i].rows > 1) {
      pack_rows(sends[i], data, stream);
      data += aligned(sends[i++].bytes);
      continue;
    }
    const void* const from = sends[i].data;
    const std::int64_t piece = take_piece(sends, i);
    const auto size = static_cast<std::size_t>(piece);
    if (carrier() == Carrier::copy_engine) {
      ANNULUS_CHECK_CUDA(cudaMemcpyAsync(data, from, size, cudaMemcpyDeviceToDevice, stream));
    } else {
      cuda::copy_by_engine(data, from, size, stream);
    }
    data += aligned(piece);
  }
  outbox_.lend(slot, stream);
  exchange.announce(*host_, slot, bytes, outbox_.promise(slot.peer()));
}

/// Every rank closes its mappings before any rank frees its slots. While an exception passes, peers
/// may be gone: the process is about to end, and the driver cleans up.
void PeerCommunicator::release() noexcept {
  if (std::uncaught_exceptions() == 0) {
    try {
      outbox_.drain(push_stream_.get());
      inbox_.drain();
      ANNULUS_CHECK_CUDA(cudaStreamSynchronize(pull_stream_.get()));
      inbox_.close();
      ANNULUS_CHECK_CUDA(cudaDeviceSynchronize());  // windows are read by callers' streams
      windows_.close();
      return;
    } catch (const std::exception&) {
      // A destructor has nobody to tell; as while an exception passes.
    }
  }
  outbox_.leak();
  inbox_.leak();
  windows_.leak();
}

}  // namespace

std::unique_ptr<Communicator> make_peer_communicator(Communicator& host,
                                                     std::unique_ptr<Communicator> far,
                                                     PeerDevices devices) {
  return PeerCommunicator::make(host.split(0, host.rank()), devices, std::move(far));
}

}  // namespace annulus
