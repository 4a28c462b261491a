#include "runtime/peer_outbox.hpp"

#include <utility>

#include "kernels/cuda/check.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kLeastCapacity = 1 << 20;
constexpr std::int64_t kShort = std::int64_t{64} << 20;  // beside what is computed with longer ones
                                                         // the host's time does not count

/// Powers of two keep the number of different sizes small.
std::int64_t capacity_for(std::int64_t bytes) {
  std::int64_t capacity = kLeastCapacity;
  while (capacity < bytes) capacity *= 2;
  return capacity;
}

}  // namespace

PeerSlot::PeerSlot(int peer, std::int64_t number, std::int64_t capacity)
    : peer_(peer), number_(number), capacity_(capacity), full_(make_shared_event()) {
  // IPC handles exist for plain allocations only, not for those of a stream's pool.
  ANNULUS_CHECK_CUDA(cudaMalloc(&data_, static_cast<std::size_t>(capacity)));
  address_.slot = number_;
  ANNULUS_CHECK_CUDA(cudaIpcGetMemHandle(&address_.memory, data_));
  address_.direct = data_;
  address_.full = address_of(full_.get());
}

PeerSlot::~PeerSlot() { cudaFree(data_); }

SlotAddress PeerSlot::address(std::int64_t bytes) const {
  SlotAddress address = address_;
  address.bytes = bytes;
  return address;
}

void PeerSlot::lend(cudaStream_t stream) {
  ANNULUS_CHECK_CUDA(cudaEventRecord(full_.get(), stream));
  lent_ = true;
}

void PeerSlot::give_back(const EventAddress& read) {
  // The peer uses one event for a slot: its address stays the same.
  if (read_ == nullptr) read_ = std::make_unique<RemoteEvent>(read);
  lent_ = false;
}

void PeerSlot::reclaim(cudaStream_t stream) const {
  if (read_ != nullptr) ANNULUS_CHECK_CUDA(cudaStreamWaitEvent(stream, read_->get()));
}

PeerSlot* PeerOutbox::free_slot(int peer, std::int64_t bytes) const {
  PeerSlot* free = nullptr;
  int fitting = 0;
  for (const std::unique_ptr<PeerSlot>& slot : slots_) {
    if (slot->peer() != peer || slot->capacity() < bytes) continue;
    ++fitting;
    if (free == nullptr && !slot->lent()) free = slot.get();
  }
  return promises_ && bytes <= kShort && fitting < 2 ? nullptr : free;
}

PeerSlot& PeerOutbox::take(int peer, std::int64_t bytes, cudaStream_t stream) {
  collect(peer);
  PeerSlot* slot = std::exchange(promised_[peer], nullptr);
  if (slot == nullptr || slot->capacity() < bytes) slot = free_slot(peer, bytes);
  if (slot != nullptr) {
    slot->reclaim(stream);
    return *slot;
  }
  slots_.push_back(std::make_unique<PeerSlot>(peer, static_cast<std::int64_t>(slots_.size()),
                                              capacity_for(bytes)));
  return *slots_.back();
}

void PeerOutbox::lend(PeerSlot& slot, cudaStream_t stream) {
  slot.lend(stream);
  auto expected = std::make_unique<Expected>();
  const Receive word{slot.peer(), &expected->word, sizeof(expected->word)};
  expected->under_way = host_.exchange({}, {&word, 1});
  expected_[slot.peer()].push_back(std::move(expected));
}

std::int64_t PeerOutbox::promise(int peer) {
  PeerSlot*& next = promised_[peer];
  for (const std::unique_ptr<PeerSlot>& slot : slots_) {
    if (!promises_ || slot->peer() != peer || slot->lent() || !slot->known()) continue;
    if (next == nullptr || next->capacity() < slot->capacity()) next = slot.get();
  }
  return next == nullptr ? 0 : next->capacity();
}

void PeerOutbox::accept(const SlotWord& word) {
  slots_.at(static_cast<std::size_t>(word.slot))->give_back(word.read);
}

void PeerOutbox::collect(int peer) {
  std::deque<std::unique_ptr<Expected>>& words = expected_[peer];
  while (!words.empty() && words.front()->under_way->test()) {
    accept(words.front()->word);
    words.pop_front();
  }
}

void PeerOutbox::drain(cudaStream_t stream) {
  for (auto& [peer, words] : expected_) {
    for (const std::unique_ptr<Expected>& expected : words) {
      expected->under_way->wait();
      accept(expected->word);
    }
    words.clear();
  }
  for (const std::unique_ptr<PeerSlot>& slot : slots_) slot->reclaim(stream);
  ANNULUS_CHECK_CUDA(cudaStreamSynchronize(stream));
}

void PeerOutbox::leak() noexcept {
  for (std::unique_ptr<PeerSlot>& slot : slots_) static_cast<void>(slot.release());
}

}  // namespace annulus
