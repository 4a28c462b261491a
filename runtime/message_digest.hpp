#pragma once

#include <cstdint>

namespace annulus {

/// 64 bits that change with any single bit of a message, and but for one in 2^64 with anything
/// else: sums, and sums of the sums, of words in eight lanes (Fletcher, "An arithmetic checksum for
/// serial transmissions"), as fast as memory is read.
std::uint64_t message_digest(const void* data, std::int64_t bytes);

}  // namespace annulus
