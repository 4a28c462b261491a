#pragma once

#include "kernels/cuda/check.hpp"
#include "kernels/sm90/forward_kernel.cuh"
#include "kernels/sm90/forward_launch.hpp"

namespace annulus::kernels::sm90 {

template <typename Tile, bool kSoftCap>
void launch_kernel(const ForwardParams& params, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedTile<Tile>);
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = forward_kernel<Tile, kSoftCap>;
  ANNULUS_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, kBytes, stream>>>(params);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

template <typename Tile>
ForwardVariant forward_variant() {
  return {Tile::kWarpgroups, Tile::kBlock, Tile::QkTile::kColumns, Tile::VTile::kColumns,
          [](const ForwardParams& params, bool soft_cap, int blocks, cudaStream_t stream) {
            soft_cap ? launch_kernel<Tile, true>(params, blocks, stream)
                     : launch_kernel<Tile, false>(params, blocks, stream);
          }};
}

}  // namespace annulus::kernels::sm90
