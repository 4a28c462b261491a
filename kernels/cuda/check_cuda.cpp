#include "kernels/cuda/check.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cuda {

void fail(cudaError_t error, const char* call, const char* file, int line) {
  cudaGetLastError();  // so that the next call does not report this one's
  throw Error(
      error == cudaErrorMemoryAllocation ? ExitCode::no_memory : ExitCode::internal,
      fmt::format("cuda: {} failed at {}:{}: {}", call, file, line, cudaGetErrorString(error)));
}

}  // namespace annulus::kernels::cuda
