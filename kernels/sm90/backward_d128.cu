#include "kernels/sm90/backward_dispatch.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = BackwardTile<Element, 128, 128, 64, 2, 1, Division::keys>;

}  // namespace

BackwardVariant backward_d128(DType dtype) {
  return dtype == DType::bf16 ? backward_variant<Tile<__nv_bfloat16>>()
                              : backward_variant<Tile<__half>>();
}

}  // namespace annulus::kernels::sm90
