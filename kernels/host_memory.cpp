#include "kernels/host_memory.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace annulus {
namespace {

/// The number after `key` in a small file of /proc; 0 when it is not there.
std::int64_t number_in(const char* path, const char* key) noexcept {
  std::array<char, 2048> text{};
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  const ssize_t length = read(file, text.data(), text.size() - 1);
  close(file);
  const char* found = length > 0 ? std::strstr(text.data(), key) : nullptr;
  return found == nullptr ? 0 : std::strtoll(found + std::strlen(key), nullptr, 10);
}

std::int64_t left_of_address_space() noexcept {
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
    return std::numeric_limits<std::int64_t>::max();
  }
  const std::int64_t used = number_in("/proc/self/statm", "") * sysconf(_SC_PAGESIZE);
  return std::max<std::int64_t>(0, static_cast<std::int64_t>(limit.rlim_cur) - used);
}

}  // namespace

std::int64_t available_host_bytes() noexcept {
  return std::min(number_in("/proc/meminfo", "MemAvailable:") * 1024, left_of_address_space());
}

}  // namespace annulus
