#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels::sm90 {

/// Where the thread blocks of a launch leave partial results.
struct Scratch {
  unsigned* arrivals;  // zeros, and left as zeros
  char* data;          // 16-byte aligned
};

/// Scratch of at least `arrivals` counters and `bytes` bytes. Launches of a stream share it, and
/// those that one capture records from a stream: they run one after another. What a capture has
/// been given lives as long as the process.
Scratch scratch(cudaStream_t stream, int arrivals, std::int64_t bytes);

}  // namespace annulus::kernels::sm90
