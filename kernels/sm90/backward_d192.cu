#include "kernels/sm90/backward_dispatch.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = BackwardTile<Element, 192, 192, 64, 2, 1, Division::roles>;

}  // namespace

BackwardVariant backward_d192(DType dtype, bool soft_cap) {
  return backward_variant_of<Tile>(dtype, soft_cap);
}

}  // namespace annulus::kernels::sm90
