#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "launch/bench_row.hpp"

namespace annulus::launch {

struct CudaBenchOptions {
  std::vector<std::int64_t> head_dims{64, 128, 256};
  std::vector<std::int64_t> seqs{16384, 4096, 1024};
  std::int64_t tokens = 16384;  // of a call: batch is tokens / seq
  std::int64_t width = 2048;    // heads are width / head_dim
  std::int64_t group = 1;       // query heads of a KV head
  std::string dtype = "bf16";
  int repeats = 13;
};

/// Attention on the current device: our kernel, cuDNN's where it was built, a product of 8192³ by
/// cuBLAS as the ceiling, in turn within one loop; medians. TFLOP/s count 4·B·H·D of a kept pair.
/// Throws usage without a device.
std::vector<BenchRow> bench_cuda_kernels(const CudaBenchOptions& options);

}  // namespace annulus::launch
