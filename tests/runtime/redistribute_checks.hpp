#pragma once

#include <cstdint>

#include "kernels/types.hpp"
#include "sharding/communicator.hpp"

namespace annulus::testing {

/// Random tensors go through random layouts over all ranks: what arrives must be right to the bit
/// in poisoned memory on `device`, and no byte may travel that is not missing. Every rank passes
/// the same seed.
void check_random_redistributions(Communicator& ranks, std::uint64_t seed, int trials,
                                  Device device = Device::cpu);

/// Random layouts whose parts share indices: every holder gives a number of its own, and each must
/// end with the sum over all holders in rank order, to the bit.
void check_random_sums(Communicator& ranks, std::uint64_t seed, int trials,
                       Device device = Device::cpu);

}  // namespace annulus::testing
