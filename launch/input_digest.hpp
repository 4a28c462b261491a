#pragma once

#include <string>

#include "sharding/communicator.hpp"

namespace annulus::launch {

/// A digest of a file's bytes, the same for any number of ranks, which share the reading:
/// "blocks-256:0123456789abcdef". Files over 256 MiB are sampled by 256 blocks of 1 MiB, evenly
/// spaced with both ends, besides their size. It tells inputs apart; it is no protection against
/// forgery. Collective; throws io.
std::string input_digest(Communicator& communicator, const std::string& path);

}  // namespace annulus::launch
