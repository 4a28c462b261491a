#include "kernels/sm90/decode_kernel.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = DecodeTile<Element, 256, 64, 3>;

}  // namespace

DecodeVariant decode_d256(DType dtype) { return decode_variant<Tile>(dtype); }

}  // namespace annulus::kernels::sm90
