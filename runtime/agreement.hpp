#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "sharding/communicator.hpp"

namespace annulus {

/// Runs `step` on every rank and compares how it ended: when it threw anywhere, all ranks throw the
/// Error of the lowest rank that failed (named, unless it is rank 0, which is the one to print),
/// so that none is left waiting in a later collective.
/// Collective; `step` itself must not be.
void agree(Communicator& communicator, const std::function<void()>& step);

/// Concatenates contributions of any size in rank order. Collective.
std::vector<std::vector<std::byte>> gather_bytes(Communicator& communicator,
                                                 const std::vector<std::byte>& mine);

/// What rank 0 gives, on every rank; it goes down a tree, each rank to at most log2(ranks) others.
/// Collective.
std::vector<std::byte> broadcast_bytes(Communicator& communicator, std::vector<std::byte> bytes);

}  // namespace annulus
