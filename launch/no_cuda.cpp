#include "kernels/error.hpp"
#include "launch/bench_cuda.hpp"

namespace annulus::launch {

std::vector<BenchRow> bench_cuda_kernels(const CudaBenchOptions& /*options*/) {
  throw Error(ExitCode::usage,
              "bench kernels: this build of annulus has no CUDA; configure with -DANNULUS_CUDA=ON "
              "or use --backend cpu");
}

}  // namespace annulus::launch
