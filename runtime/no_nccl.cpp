#include "kernels/error.hpp"
#include "runtime/nccl_communicator.hpp"

namespace annulus {

bool has_nccl() { return false; }

const char* nccl_version() { return ""; }

std::unique_ptr<Communicator> make_nccl_communicator(Communicator& /*host*/) {
  throw Error(ExitCode::usage,
              "nccl: this build of annulus has no NCCL; use --transport mpi, or build where "
              "CUDA and NCCL are");
}

}  // namespace annulus
