#pragma once

#include "kernels/sm90/forward_kernel.cuh"
#include "kernels/sm90/forward_launch.hpp"

namespace annulus::kernels::sm90 {

template <typename Tile, bool kSoftCap>
void launch_forward_kernel(const ForwardParams& params, int blocks, cudaStream_t stream) {
  launch_early<Tile, SharedTile<Tile>>(forward_kernel<Tile, kSoftCap>, params, blocks, stream);
}

template <typename Tile>
ForwardVariant forward_variant() {
  return {Tile::kWarpgroups,
          Tile::kBlock,
          Tile::kPassesOver,
          Tile::QkTile::kColumns,
          Tile::VTile::kColumns,
          [](const ForwardParams& params, bool soft_cap, int blocks, cudaStream_t stream) {
            soft_cap ? launch_forward_kernel<Tile, true>(params, blocks, stream)
                     : launch_forward_kernel<Tile, false>(params, blocks, stream);
          }};
}

}  // namespace annulus::kernels::sm90
