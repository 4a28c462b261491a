#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "sharding/communicator.hpp"

namespace annulus {

/// What carries device memory between ranks. Host memory goes by MPI always.
enum class Transport : std::uint8_t {
  automatic,  // peer inside a node; between nodes NCCL, or mpi in a build without it
  mpi,        // through host memory
  nccl,
  peer,  // the copy engine over CUDA IPC mappings, inside a node only
};

std::string_view name(Transport transport);  // "auto", "mpi", "nccl", "peer"
std::optional<Transport> parse_transport(std::string_view text);

/// A communicator between the current devices of the ranks of `host`, which carries the set-up.
/// Collective over `host`; `nodes` is how many of them the ranks span. Throws usage where the
/// transport is not built or does not reach.
std::unique_ptr<Communicator> make_device_communicator(Communicator& host, Transport transport,
                                                       int nodes);

}  // namespace annulus
