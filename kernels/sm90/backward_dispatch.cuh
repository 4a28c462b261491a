#pragma once

#include "kernels/cuda/check.hpp"
#include "kernels/sm90/backward_kernel.cuh"
#include "kernels/sm90/backward_launch.hpp"

namespace annulus::kernels::sm90 {

template <typename Tile, bool kSoftCap>
void launch_backward_kernel(const BackwardParams& params, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedBackward<Tile>);
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = backward_kernel<Tile, kSoftCap>;
  ANNULUS_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, kBytes, stream>>>(params);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

template <typename Tile>
void launch_tile(const BackwardParams& params, bool soft_cap, int blocks, cudaStream_t stream) {
  soft_cap ? launch_backward_kernel<Tile, true>(params, blocks, stream)
           : launch_backward_kernel<Tile, false>(params, blocks, stream);
}

template <typename Tile>
BackwardVariant backward_variant() {
  return {Tile::kQueries, Tile::kKeys, Tile::QkTile::kColumns, Tile::VTile::kColumns,
          [](const BackwardParams& params, bool soft_cap, int blocks, cudaStream_t stream) {
            params.turns == nullptr
                ? launch_tile<Tile>(params, soft_cap, blocks, stream)
                : launch_tile<OrderedTile<Tile>>(params, soft_cap, blocks, stream);
          }};
}

}  // namespace annulus::kernels::sm90
