#pragma once

#include <cstdint>
#include <memory>

#include "runtime/mpi_communicator.hpp"
#include "runtime/operation_log.hpp"

namespace annulus {

/// Shared memory between the ranks of `handle`, whose `group` outlives it, on one node. Collective
/// over the handle's ranks.
std::unique_ptr<Window> make_mpi_window(MpiHandle handle, OperationGroup& group,
                                        std::int64_t bytes);

}  // namespace annulus
