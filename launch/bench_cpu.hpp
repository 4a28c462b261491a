#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "launch/bench_row.hpp"

namespace annulus::launch {

struct CpuBenchOptions {
  std::vector<std::int64_t> head_dims{128, 64};
  std::vector<std::int64_t> seqs{4096, 1024};
  std::vector<std::string> dtypes{"f32", "bf16"};
  std::vector<std::string> masks{"full", "causal"};  // and "window": 512 keys of 16384
  std::vector<std::string> directions{"forward", "backward", "decode"};
  std::int64_t heads = 8;
  std::int64_t group = 1;  // query heads of a KV head
  int repeats = 7;
};

/// Attention on the processor's threads. Each row is measured in turn with its ceiling, the peak of
/// a loop in registers (multiply-adds; for bf16 the tile unit or the dot product, which the row's
/// name tells) or (decode) the rate of reading memory, and with sgemm of OpenBLAS where it is
/// installed; medians. FLOPs count 4·B·H·D of a kept pair, 2.5 times that backward.
std::vector<BenchRow> bench_cpu_kernels(const CpuBenchOptions& options);

}  // namespace annulus::launch
