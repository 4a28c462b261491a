#include "kernels/sm90/forward_dispatch.cuh"

namespace annulus::kernels::sm90 {
namespace {

template <typename Element>
using Wide = ForwardTile<Element, 192, 128, 2, 128, 2, 1, true>;

template <typename Element>
ForwardVariants variants() {
  return {forward_variant<Wide<Element>>(), forward_variant<Wide<Element>>()};
}

}  // namespace

ForwardVariants forward_d192_v128(DType dtype) {
  return dtype == DType::bf16 ? variants<__nv_bfloat16>() : variants<__half>();
}

}  // namespace annulus::kernels::sm90
