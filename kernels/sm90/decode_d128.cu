#include "kernels/sm90/decode_kernel.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = DecodeTile<Element, 128, 64, 6, 2>;

/// Looking up a block's pages costs a gatherer as much as copying 40 of its tokens.
template <typename Element>
using GatheredTile = DecodeTile<Element, 128, 128, 3>;

}  // namespace

DecodeVariant decode_d128(DType dtype) { return decode_variant<Tile>(dtype); }
DecodeVariant decode_d128_gathered(DType dtype) { return decode_variant<GatheredTile>(dtype); }

}  // namespace annulus::kernels::sm90
