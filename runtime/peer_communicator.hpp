#pragma once

#include <cstdint>
#include <memory>

#include "sharding/communicator.hpp"

namespace annulus {

/// `apart`: ranks that share a device take it for their own, as tests want it where there is but
/// one. Their kernels must leave each other room.
enum class PeerDevices : std::uint8_t { as_found, apart };

/// A communicator between the current CUDA devices of ranks on one node: the copy engine pulls from
/// the sender's memory over CUDA IPC mappings, or directly between ranks that are threads, so that
/// no multiprocessor is taken. Ranks may share a device. `host` carries the set-up; ranks of other
/// nodes are reached through `far`, where given. Collective over `host`. Throws usage in a build
/// without CUDA, and when a rank of another node has no `far`.
std::unique_ptr<Communicator> make_peer_communicator(Communicator& host,
                                                     std::unique_ptr<Communicator> far = nullptr,
                                                     PeerDevices devices = PeerDevices::as_found);

}  // namespace annulus
