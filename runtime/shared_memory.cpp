#include "runtime/shared_memory.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <random>

#include "kernels/error.hpp"
#include "kernels/host_memory.hpp"

namespace annulus {
namespace {

constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;

// Beyond the limit on the size of files the kernel would end the process by a signal.
bool file_size_is_allowed(std::int64_t bytes) {
  rlimit limit{};
  return getrlimit(RLIMIT_FSIZE, &limit) == 0 &&
         (limit.rlim_cur == RLIM_INFINITY || static_cast<rlim_t>(bytes) <= limit.rlim_cur);
}

std::uint64_t new_stamp() {
  std::random_device random;
  return (std::uint64_t{random()} << 32) | random();
}

// The memory behind a ticket; -1 where it cannot be opened or is another than the ticket says.
int open_ticket(const SharedMemory::Ticket& ticket) {
  const std::string path = fmt::format("/proc/{}/fd/{}", ticket.process, ticket.descriptor);
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return -1;
  struct stat status {};
  std::uint64_t stamp = 0;
  const bool same = fstat(descriptor, &status) == 0 && status.st_size == ticket.bytes &&
                    pread(descriptor, &stamp, sizeof stamp, 0) == sizeof stamp &&
                    stamp == ticket.stamp;
  if (same) return descriptor;
  ::close(descriptor);
  return -1;
}

}  // namespace

SharedMemory::SharedMemory(std::int64_t bytes) {
  ticket_ = {getpid(), -1, bytes, new_stamp()};
  if (!file_size_is_allowed(bytes)) return;
  const int descriptor = memfd_create("annulus", MFD_CLOEXEC);
  if (descriptor < 0) return;
  const bool made = ftruncate(descriptor, bytes) == 0 &&
                    pwrite(descriptor, &ticket_.stamp, sizeof ticket_.stamp, 0) ==
                        static_cast<ssize_t>(sizeof ticket_.stamp);
  if (made) {
    ticket_.descriptor = descriptor;
  } else {
    ::close(descriptor);
  }
}

SharedMemory::~SharedMemory() {
  close();
  if (reserved_ != nullptr) munmap(reserved_, reserved_bytes_);
}

void SharedMemory::close() {
  if (ticket_.descriptor >= 0) ::close(static_cast<int>(ticket_.descriptor));
  ticket_.descriptor = -1;
}

bool SharedMemory::map(std::span<const Ticket> tickets, std::size_t own) {
  for (const Ticket& ticket : tickets) {
    if (ticket.descriptor < 0 || ticket.bytes != ticket_.bytes) return false;
  }
  const auto bytes = static_cast<std::size_t>(ticket_.bytes);
  reserved_bytes_ = bytes * tickets.size() + kHugePage;
  void* const reserved =
      mmap(nullptr, reserved_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(reserved != MAP_FAILED, ExitCode::no_memory,
          "memory: {} bytes wanted for windows of {} ranks, {} available", reserved_bytes_,
          tickets.size(), available_host_bytes());
  reserved_ = reserved;
  const auto address = reinterpret_cast<std::uintptr_t>(reserved);
  base_ = reinterpret_cast<std::byte*>((address + kHugePage - 1) / kHugePage * kHugePage);
  for (std::size_t i = 0; i < tickets.size(); ++i) {
    if (!map_one(tickets[i], at(i), i == own)) return false;
  }
  local_ = at(own);
  populated_.assign(bytes / kHugePage, false);
  return true;
}

bool SharedMemory::map_one(const Ticket& ticket, std::byte* at, bool own) const {
  const int descriptor = own ? static_cast<int>(ticket.descriptor) : open_ticket(ticket);
  if (descriptor < 0) return false;
  const auto bytes = static_cast<std::size_t>(ticket.bytes);
  const void* mapped = mmap(at, bytes, own ? PROT_READ | PROT_WRITE : PROT_READ,
                            MAP_SHARED | MAP_FIXED, descriptor, 0);
  if (!own) ::close(descriptor);
  if (mapped == MAP_FAILED) return false;
  return true;
}

// Kernels read rows that lie pages apart: with small pages they wait for address translations, and
// each of those pages is a fault in every process (measured: 8% of a causal forward pass over 8,192
// tokens). Few systems give shared memory huge pages by themselves, but all since Linux 6.1 when
// asked to collapse what has at least one small page.
void SharedMemory::populate(std::int64_t begin, std::int64_t end) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which old headers lack
  const auto page = static_cast<std::int64_t>(kHugePage);
  const std::int64_t last = std::min(static_cast<std::int64_t>(populated_.size()), end / page);
  for (std::int64_t i = (begin + page - 1) / page; i < last; ++i) {
    if (populated_[static_cast<std::size_t>(i)]) continue;
    populated_[static_cast<std::size_t>(i)] = true;
    volatile std::byte* const first = local_ + i * page;
    *first = *first;
    (void)madvise(local_ + i * page, kHugePage, kCollapse);  // a wish
  }
}

}  // namespace annulus
