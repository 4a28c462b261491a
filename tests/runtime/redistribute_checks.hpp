#pragma once

#include <cstdint>

#include "sharding/communicator.hpp"

namespace annulus::testing {

/// Random tensors go through random layouts over all ranks: what arrives must be right to the bit
/// in poisoned memory, and no byte may travel that is not missing. Every rank passes the same seed.
void check_random_redistributions(Communicator& ranks, std::uint64_t seed, int trials);

}  // namespace annulus::testing
