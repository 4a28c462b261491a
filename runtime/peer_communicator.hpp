#pragma once

#include <memory>

#include "sharding/communicator.hpp"

namespace annulus {

/// A communicator between the current CUDA devices of ranks on one node: the copy engine pulls from
/// the sender's memory over CUDA IPC mappings, or directly between ranks that are threads, so that
/// no multiprocessor is taken. Ranks may share a device. `host` carries the set-up; ranks of other
/// nodes are reached through `far`, where given. Collective over `host`. Throws usage in a build
/// without CUDA, and when a rank of another node has no `far`.
std::unique_ptr<Communicator> make_peer_communicator(Communicator& host,
                                                     std::unique_ptr<Communicator> far = nullptr);

}  // namespace annulus
