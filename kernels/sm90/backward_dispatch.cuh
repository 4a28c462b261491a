#pragma once

#include "kernels/sm90/backward_kernel.cuh"
#include "kernels/sm90/backward_launch.hpp"
#include "kernels/sm90/launch.cuh"

namespace annulus::kernels::sm90 {

template <typename Tile, bool kSoftCap>
void launch_backward_kernel(const BackwardParams& params, int blocks, cudaStream_t stream) {
  launch_blocks<Tile, SharedBackward<Tile>>(backward_kernel<Tile, kSoftCap>, params, blocks,
                                            stream);
}

template <typename Tile, bool kSoftCap>
BackwardVariant backward_variant() {
  return {Tile::kQueries,
          Tile::kKeys,
          Tile::QkTile::kColumns,
          Tile::VTile::kColumns,
          Tile::kDrainRows,
          Tile::kDrained ? 64 : 1,
          [](const BackwardParams& params, int blocks, cudaStream_t stream) {
            params.turns == nullptr
                ? launch_backward_kernel<Tile, kSoftCap>(params, blocks, stream)
                : launch_backward_kernel<OrderedTile<Tile>, kSoftCap>(params, blocks, stream);
          }};
}

/// The variant of an element type and of scores with or without a soft cap.
template <template <typename> typename Tile, template <typename> typename CappedTile = Tile>
BackwardVariant backward_variant_of(DType dtype, bool soft_cap) {
  if (dtype == DType::bf16) {
    return soft_cap ? backward_variant<CappedTile<__nv_bfloat16>, true>()
                    : backward_variant<Tile<__nv_bfloat16>, false>();
  }
  return soft_cap ? backward_variant<CappedTile<__half>, true>()
                  : backward_variant<Tile<__half>, false>();
}

}  // namespace annulus::kernels::sm90
