#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels::sm90 {

/// Where the thread blocks of a decode launch leave partial results.
struct DecodeScratch {
  float* partial_o;
  float2* partial_statistics;
  unsigned* arrivals;  // zeros
};

/// Scratch of at least `blocks` thread blocks with two slots of `rows` rows of `value_dim` columns.
/// Launches of a stream share it, and those that one capture records from a stream: they run one
/// after another. What a capture has been given lives as long as the process.
DecodeScratch decode_scratch(cudaStream_t stream, int blocks, int rows, int value_dim);

}  // namespace annulus::kernels::sm90
