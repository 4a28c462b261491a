#include "kernels/sm90/backward_pair_kernel.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = PairTile<Element, 192, 128, 4, 4, 2>;

}  // namespace

BackwardVariant backward_d192_v128(DType dtype, bool soft_cap) {
  return pair_variant_of<Tile>(dtype, soft_cap);
}

}  // namespace annulus::kernels::sm90
