#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "runtime/peer_event.hpp"
#include "sharding/communicator.hpp"

namespace annulus {

/// What a receiver needs to pull a message: the sender's slot and the event that says it is full.
struct SlotAddress {
  std::int64_t slot;      // unique within the sender
  std::int64_t bytes;     // of the message
  std::int64_t promised;  // of the next message, if it is not longer: it will lie in a known slot
  cudaIpcMemHandle_t memory;
  void* direct;
  EventAddress full;
};

/// The receiver's word that a slot is free once `read` has happened.
struct SlotWord {
  std::int64_t slot;
  EventAddress read;
};

/// Memory that one peer maps.
class PeerSlot {
 public:
  PeerSlot(int peer, std::int64_t number, std::int64_t capacity);
  ~PeerSlot();
  PeerSlot(const PeerSlot&) = delete;
  PeerSlot& operator=(const PeerSlot&) = delete;

  int peer() const { return peer_; }
  std::int64_t capacity() const { return capacity_; }
  void* data() const { return data_; }
  /// For a message of `bytes`.
  SlotAddress address(std::int64_t bytes) const;

  bool lent() const { return lent_; }
  /// The peer has read a message from it.
  bool known() const { return read_ != nullptr; }
  /// What `stream` holds now fills the slot; from then on it is the peer's.
  void lend(cudaStream_t stream);
  void give_back(const EventAddress& read);
  /// Makes `stream` wait until the peer has read what was last lent.
  void reclaim(cudaStream_t stream) const;

 private:
  int peer_;
  std::int64_t number_;
  std::int64_t capacity_;
  void* data_ = nullptr;
  bool lent_ = false;
  kernels::cuda::OwnedEvent full_;
  SlotAddress address_{};  // handles take the driver longer than a message takes
  std::unique_ptr<RemoteEvent> read_;
};

/// The slots that a rank fills for its peers. There are as many as are lent at a time: a peer gives
/// one back when it has queued its copy, in any order.
///
/// With `promises` there are two for short messages, so that one which the peer knows is free when
/// a message leaves. It is kept for the next one, and the peer is told: it will have nothing to
/// map.
class PeerOutbox {
 public:
  /// `host` carries the peers' words and nothing else.
  PeerOutbox(Communicator& host, bool promises) : host_(host), promises_(promises) {}

  /// A slot of at least `bytes` for `peer`; `stream` waits until it may be written.
  PeerSlot& take(int peer, std::int64_t bytes, cudaStream_t stream);
  /// Lends a filled slot, and expects it back.
  void lend(PeerSlot& slot, cudaStream_t stream);
  /// Of the next message to `peer`, after a slot was lent: 0, or the most for which the promise is.
  std::int64_t promise(int peer);
  /// Waits until everything lent was given back and read.
  void drain(cudaStream_t stream);
  /// Forgets all slots without freeing them.
  void leak() noexcept;

 private:
  struct Expected {
    SlotWord word{};
    std::unique_ptr<Exchange> under_way;
  };

  void accept(const SlotWord& word);
  void collect(int peer);
  /// Null where no slot is free, or where the peer should have another one.
  PeerSlot* free_slot(int peer, std::int64_t bytes) const;

  Communicator& host_;
  bool promises_;
  std::vector<std::unique_ptr<PeerSlot>> slots_;
  std::map<int, PeerSlot*> promised_;                              // by peer
  std::map<int, std::deque<std::unique_ptr<Expected>>> expected_;  // by peer, in order of arrival
};

}  // namespace annulus
