#include "kernels/sm90/backward_dispatch.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = BackwardTile<Element, 128, 128, 80, 2, 1, Division::halves>;

// The slope of the cap takes registers that scores of 80 queries leave no room for.
template <typename Element>
using CappedTile = BackwardTile<Element, 128, 128, 64, 2, 1, Division::halves>;

}  // namespace

BackwardVariant backward_d128(DType dtype, bool soft_cap) {
  return backward_variant_of<Tile, CappedTile>(dtype, soft_cap);
}

}  // namespace annulus::kernels::sm90
