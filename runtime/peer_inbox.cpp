#include "runtime/peer_inbox.hpp"

#include <algorithm>

#include "kernels/cuda/check.hpp"
#include "kernels/error.hpp"

namespace annulus {

MappedSlot::MappedSlot(const SlotAddress& address)
    : data_(address.direct),
      full_(address.full),
      read_(make_shared_event()),
      read_address_(address_of(read_.get())) {
  if (is_of_this_process(address.full)) return;
  ANNULUS_CHECK_CUDA(cudaIpcOpenMemHandle(&data_, address.memory, cudaIpcMemLazyEnablePeerAccess));
  mapped_ = true;
}

MappedSlot::~MappedSlot() {
  if (mapped_) cudaIpcCloseMemHandle(data_);
}

PeerInbox::Expected PeerInbox::expect(int peer, std::int64_t bytes) {
  Numbers& numbers = numbers_[peer];
  const std::int64_t number = numbers.next++;
  return {number, numbers.last == number - 1 && bytes <= numbers.promised};
}

const MappedSlot& PeerInbox::open(int peer, const Expected& expected, const SlotAddress& address) {
  Numbers& numbers = numbers_[peer];
  if (expected.number > numbers.last) {
    numbers.last = expected.number;
    numbers.promised = address.promised;
  }
  std::unique_ptr<MappedSlot>& slot = mapped_[{peer, address.slot}];
  require(slot != nullptr || !expected.mapped, ExitCode::peer,
          "exchange: message {} of rank {} lies in slot {}, which it had not lent before",
          expected.number, peer, address.slot);
  if (slot == nullptr) slot = std::make_unique<MappedSlot>(address);
  return *slot;
}

void PeerInbox::give_back(int peer, const SlotAddress& address, const MappedSlot& slot,
                          cudaStream_t stream) {
  std::erase_if(words_, [](const std::unique_ptr<Word>& word) { return word->sent->test(); });
  ANNULUS_CHECK_CUDA(cudaEventRecord(slot.read(), stream));
  auto word = std::make_unique<Word>();
  word->word = {address.slot, slot.read_address()};
  const Send send{peer, &word->word, sizeof(word->word)};
  word->sent = host_.exchange({&send, 1}, {});
  words_.push_back(std::move(word));
}

void PeerInbox::drain() {
  for (const std::unique_ptr<Word>& word : words_) word->sent->wait();
  words_.clear();
}

void PeerInbox::leak() noexcept {
  for (auto& [key, slot] : mapped_) static_cast<void>(slot.release());
}

}  // namespace annulus
