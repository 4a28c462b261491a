#include "runtime/window_files.hpp"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace annulus {
namespace {

// What the kernel writes of one entry; glibc's readdir is not async-signal-safe.
struct DirectoryEntry {
  std::uint64_t inode;
  std::int64_t next;
  unsigned short bytes;
  unsigned char type;
  char name[1];
};

std::array<char, 512> folder{};
std::array<char, 32> job{};  // ".2508f001.", in the middle of the names; empty: no such job

void remove_matching(int directory, const char* entries, long bytes) noexcept {
  for (long at = 0; at < bytes;) {
    const auto* entry = reinterpret_cast<const DirectoryEntry*>(entries + at);
    const bool ours = std::strncmp(entry->name, "osc_sm.", 7) == 0 &&
                      std::strstr(entry->name, job.data()) != nullptr;
    if (ours) static_cast<void>(unlinkat(directory, entry->name, 0));
    at += entry->bytes;
  }
}

}  // namespace

void find_window_files() {
  const char* number = std::getenv("PMIX_NAMESPACE");
  if (number == nullptr || *number < '0' || *number > '9') return;
  const char* place = std::getenv("OMPI_MCA_osc_sm_backing_directory");
  std::snprintf(folder.data(), folder.size(), "%s", place != nullptr ? place : "/dev/shm");
  std::snprintf(job.data(), job.size(), ".%lx.", std::strtoul(number, nullptr, 10));
}

void remove_window_files() noexcept {
  if (job[0] == '\0') return;
  const int directory = open(folder.data(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return;
  alignas(DirectoryEntry) std::array<char, 8192> entries;
  for (;;) {
    const long bytes = syscall(SYS_getdents64, directory, entries.data(), entries.size());
    if (bytes <= 0) break;
    remove_matching(directory, entries.data(), bytes);
  }
  close(directory);
}

}  // namespace annulus
