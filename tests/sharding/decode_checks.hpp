#pragma once

#include "kernels/decode_case.hpp"
#include "sharding/communicator.hpp"

namespace annulus::testing {

/// Deals the case's cache to the ranks in blocks, lets each attend over its part, merges, and
/// expects the reference's results on every rank, split by heads and everywhere, and as many bytes
/// as merge_bytes() says. Collective.
void expect_dealt_decode(Communicator& ranks, const DecodeCase& expected, std::int64_t block,
                         std::int64_t page_size);

}  // namespace annulus::testing
