#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

#include "kernels/types.hpp"

namespace annulus::kernels::sm90 {

/// One dimension of a tensor as the copy engine sees it; strides in elements.
struct MapDim {
  std::int64_t extent;
  std::int64_t stride;
  int box;
};

/// Map of a 16-bit or f32 tensor, innermost dimension first (its stride is 1), with boxes swizzled
/// over their inner width of 64 or 128 bytes; L2 fetches at least what `promotion` says at a time.
/// Throws bad_data with the extents and strides refused.
template <std::size_t kRank>
CUtensorMap make_tensor_map(const void* data, DType dtype, const std::array<MapDim, kRank>& dims,
                            CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B);

extern template CUtensorMap make_tensor_map<4>(const void*, DType, const std::array<MapDim, 4>&,
                                               CUtensorMapL2promotion);
extern template CUtensorMap make_tensor_map<5>(const void*, DType, const std::array<MapDim, 5>&,
                                               CUtensorMapL2promotion);

}  // namespace annulus::kernels::sm90
