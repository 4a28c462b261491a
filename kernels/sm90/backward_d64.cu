#include "kernels/sm90/backward_dispatch.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = BackwardTile<Element, 64, 64, 64, 3, 1, Division::turns, 3>;

// The slope of the cap takes registers that scores of 64 queries leave no room for.
template <typename Element>
using CappedTile = BackwardTile<Element, 64, 64, 48, 3, 1, Division::turns, 3>;

}  // namespace

BackwardVariant backward_d64(DType dtype, bool soft_cap) {
  return backward_variant_of<Tile, CappedTile>(dtype, soft_cap);
}

}  // namespace annulus::kernels::sm90
