#include "kernels/error.hpp"
#include "launch/bench_cuda.hpp"
#include "launch/bench_decode.hpp"

namespace annulus::launch {

std::vector<BenchRow> bench_cuda_kernels(const CudaBenchOptions& /*options*/) {
  throw Error(ExitCode::usage,
              "bench kernels: this build of annulus has no CUDA; configure with -DANNULUS_CUDA=ON "
              "or use --backend cpu");
}

std::vector<BenchRow> bench_cuda_decode(const DecodeBenchOptions& /*options*/) {
  throw Error(ExitCode::usage,
              "bench decode: this build of annulus has no CUDA; configure with -DANNULUS_CUDA=ON "
              "or use --backend cpu");
}

}  // namespace annulus::launch
