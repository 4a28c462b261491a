#pragma once

#include <memory>

#include "sharding/communicator.hpp"

namespace annulus {

/// Whether this build has NCCL; no_nccl.cpp stands in where it has not.
bool has_nccl();

/// NCCL's version as text; empty without NCCL.
const char* nccl_version();

/// A communicator between the current CUDA devices of the ranks of `host`, which carries the
/// set-up and host memory. Collective over `host`. Throws usage in a build without NCCL.
std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host);

}  // namespace annulus
