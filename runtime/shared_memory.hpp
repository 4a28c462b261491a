#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace annulus {

/// Memory of one process that the processes of its node map side by side: anonymous, gone with the
/// last of them, and on huge pages where the kernel grants them.
class SharedMemory {
 public:
  /// What another process needs to find the memory.
  struct Ticket {
    std::int64_t process = 0;
    std::int64_t descriptor = -1;  // -1: none could be made
    std::int64_t bytes = 0;
    std::uint64_t stamp = 0;
  };

  /// `bytes` of cleared memory that costs nothing before it is touched; a ticket of descriptor -1
  /// where the system has no such memory or a limit on files forbids it.
  explicit SharedMemory(std::int64_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  const Ticket& ticket() const { return ticket_; }
  /// Maps the memory of all tickets, `bytes` of each, one behind the other; tickets[own] is this
  /// one's, the only one that may be written. False where one cannot be reached: a process in
  /// another container, or one whose memory is protected from its neighbours. Throws no_memory when
  /// there are no addresses.
  bool map(std::span<const Ticket> tickets, std::size_t own);
  /// Gives up the descriptor, when everybody has mapped.
  void close();

  /// Makes the pages of bytes [begin, end) of this one's memory, unless they were made: huge where
  /// the kernel can, here and in the processes that map them.
  void populate(std::int64_t begin, std::int64_t end);

  std::int64_t bytes() const { return ticket_.bytes; }
  std::byte* at(std::size_t ticket) const {
    return base_ + static_cast<std::int64_t>(ticket) * ticket_.bytes;
  }

 private:
  bool map_one(const Ticket& ticket, std::byte* at, bool own) const;

  Ticket ticket_;
  void* reserved_ = nullptr;
  std::size_t reserved_bytes_ = 0;
  std::byte* base_ = nullptr;
  std::byte* local_ = nullptr;
  std::vector<bool> populated_;  // of each huge page
};

}  // namespace annulus
