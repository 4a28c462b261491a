#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "runtime/peer_outbox.hpp"

namespace annulus {

/// A peer's slot mapped into this process, and the event that tells the peer that it was read.
class MappedSlot {
 public:
  explicit MappedSlot(const SlotAddress& address);
  ~MappedSlot();
  MappedSlot(const MappedSlot&) = delete;
  MappedSlot& operator=(const MappedSlot&) = delete;

  const std::byte* data() const { return static_cast<const std::byte*>(data_); }
  cudaEvent_t full() const { return full_.get(); }
  cudaEvent_t read() const { return read_.get(); }
  const EventAddress& read_address() const { return read_address_; }

 private:
  void* data_;
  bool mapped_ = false;
  RemoteEvent full_;
  kernels::cuda::OwnedEvent read_;
  EventAddress read_address_;
};

/// The slots of peers from which this rank pulls. Mappings are kept: opening one takes longer than
/// a copy.
class PeerInbox {
 public:
  /// `host` carries the words to the peers and nothing else.
  explicit PeerInbox(Communicator& host) : host_(host) {}

  /// The next message from a peer: its number, and whether `bytes` come in a slot that is mapped.
  struct Expected {
    std::int64_t number;
    bool mapped;
  };
  Expected expect(int peer, std::int64_t bytes);
  const MappedSlot& open(int peer, const Expected& expected, const SlotAddress& address);
  /// Tells the sender that its slot is free after what `stream` holds now.
  void give_back(int peer, const SlotAddress& address, const MappedSlot& slot, cudaStream_t stream);
  /// Waits until all words have left.
  void drain();
  void close() { mapped_.clear(); }
  /// Forgets all mappings without closing them.
  void leak() noexcept;

 private:
  struct Word {
    SlotWord word{};
    std::unique_ptr<Exchange> sent;
  };

  /// Of a peer's messages.
  struct Numbers {
    std::int64_t next = 0;
    std::int64_t last = -1;     // the last one whose address came
    std::int64_t promised = 0;  // with it
  };

  Communicator& host_;
  std::map<int, Numbers> numbers_;                                              // by peer
  std::map<std::pair<int, std::int64_t>, std::unique_ptr<MappedSlot>> mapped_;  // by peer and slot
  std::vector<std::unique_ptr<Word>> words_;                                    // under way
};

}  // namespace annulus
