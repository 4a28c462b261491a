#include "kernels/error.hpp"
#include "runtime/peer_communicator.hpp"

namespace annulus {

std::unique_ptr<Communicator> make_peer_communicator(Communicator& /*host*/,
                                                     std::unique_ptr<Communicator> /*far*/,
                                                     PeerDevices /*devices*/) {
  throw Error(ExitCode::usage,
              "peer: this build of annulus has no CUDA; use --transport mpi, or configure with "
              "-DANNULUS_CUDA=ON");
}

}  // namespace annulus
