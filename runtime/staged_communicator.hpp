#pragma once

#include <memory>

#include "sharding/communicator.hpp"

namespace annulus {

/// Moves device memory through the host: for builds without NCCL, and to tell a transport's fault
/// from a kernel's. Sends wait for the device. Collective over `host`.
std::unique_ptr<Communicator> make_staged_communicator(Communicator& host);

}  // namespace annulus
