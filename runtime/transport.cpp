#include "runtime/transport.hpp"

#include <array>

#include "kernels/error.hpp"
#include "runtime/nccl_communicator.hpp"
#include "runtime/peer_communicator.hpp"
#include "runtime/staged_communicator.hpp"

namespace annulus {
namespace {

constexpr std::array<std::string_view, 4> kNames{"auto", "mpi", "nccl", "peer"};

std::unique_ptr<Communicator> between_nodes(Communicator& host) {
  return has_nccl() ? make_nccl_communicator(host) : make_staged_communicator(host);
}

}  // namespace

std::string_view name(Transport transport) { return kNames[static_cast<std::size_t>(transport)]; }

std::optional<Transport> parse_transport(std::string_view text) {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == text) return static_cast<Transport>(i);
  }
  return std::nullopt;
}

std::unique_ptr<Communicator> make_device_communicator(Communicator& host, Transport transport,
                                                       int nodes) {
  switch (transport) {
    case Transport::mpi:
      return make_staged_communicator(host);
    case Transport::nccl:
      return make_nccl_communicator(host);
    case Transport::peer:
      require(nodes == 1, ExitCode::usage,
              "peer: the ranks are on {} nodes; use --transport auto or nccl", nodes);
      return make_peer_communicator(host);
    case Transport::automatic:
      break;
  }
  return make_peer_communicator(host, nodes == 1 ? nullptr : between_nodes(host));
}

}  // namespace annulus
