#include "kernels/error.hpp"
#include "launch/bench_decode.hpp"

namespace annulus::launch {

std::vector<BenchRow> bench_cuda_decode(const DecodeBenchOptions& /*options*/) {
  throw Error(ExitCode::usage, "bench decode: --backend cuda has no kernel; use --backend cpu");
}

}  // namespace annulus::launch
