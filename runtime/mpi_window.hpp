#pragma once

#include <cstdint>
#include <memory>

#include "runtime/mpi_communicator.hpp"

namespace annulus {

/// Shared memory between the ranks of `handle` on one node. Collective over the handle's ranks.
std::unique_ptr<Window> make_mpi_window(MpiHandle handle, std::int64_t bytes);

}  // namespace annulus
