#include "kernels/sm90/decode_kernel.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Tile = DecodeTile<Element, 64, 128, 6, 2>;

}  // namespace

DecodeVariant decode_d64(DType dtype) { return decode_variant<Tile>(dtype); }

}  // namespace annulus::kernels::sm90
