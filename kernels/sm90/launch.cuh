#pragma once

#include "kernels/cuda/check.hpp"

namespace annulus::kernels::sm90 {

/// Shared memory that a block may have.
inline constexpr int kMostSharedBytes = 227 * 1024;

/// Lets each block of a kernel keep a Shared; returns its bytes.
template <typename Shared, typename Params>
int allow_shared(void (*kernel)(Params)) {
  constexpr int kBytes = sizeof(Shared);
  static_assert(kBytes <= kMostSharedBytes);
  ANNULUS_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  return kBytes;
}

/// Launches a kernel whose blocks keep a Shared.
template <typename Tile, typename Shared, typename Params>
void launch_blocks(void (*kernel)(Params), const Params& params, int blocks, cudaStream_t stream) {
  const int bytes = allow_shared<Shared>(kernel);
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, bytes, stream>>>(params);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

}  // namespace annulus::kernels::sm90
