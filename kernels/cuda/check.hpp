#pragma once

#include <cuda_runtime.h>

namespace annulus::kernels::cuda {

/// Throws no_memory or internal with the call, its place and CUDA's own words.
[[noreturn]] void fail(cudaError_t error, const char* call, const char* file, int line);

inline void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error != cudaSuccess) fail(error, call, file, line);
}

}  // namespace annulus::kernels::cuda

#define ANNULUS_CHECK_CUDA(call) ::annulus::kernels::cuda::check((call), #call, __FILE__, __LINE__)
