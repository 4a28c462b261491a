#pragma once

#include <cstdint>

namespace annulus {

/// Bytes that this process could still get from the machine: what the kernel calls available, less
/// what RLIMIT_AS forbids. 0 where /proc does not tell. Does not allocate.
std::int64_t available_host_bytes() noexcept;

}  // namespace annulus
