#include "kernels/sm90/backward_pair_kernel.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = PairTile<Element, 256, 256, 4, 3, 1>;

}  // namespace

BackwardVariant backward_d256(DType dtype, bool soft_cap) {
  return pair_variant_of<Tile>(dtype, soft_cap);
}

}  // namespace annulus::kernels::sm90
