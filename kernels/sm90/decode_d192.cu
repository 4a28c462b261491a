#include "kernels/sm90/decode_kernel.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = DecodeTile<Element, 192, 64, 4>;

}  // namespace

DecodeVariant decode_d192(DType dtype) { return decode_variant<Tile>(dtype); }

}  // namespace annulus::kernels::sm90
