#include "kernels/sm90/forward_dispatch.cuh"

namespace annulus::kernels::sm90 {
namespace {

// Bound by the exponentials: long blocks amortise what is done once a block.
template <typename Element>
using Wide = ForwardTile<Element, 64, 64, 3, 192, 2, 2, true, false>;

template <typename Element>
ForwardVariants variants() {
  return {forward_variant<Wide<Element>>(), forward_variant<Wide<Element>>()};
}

}  // namespace

ForwardVariants forward_d64(DType dtype) {
  return dtype == DType::bf16 ? variants<__nv_bfloat16>() : variants<__half>();
}

}  // namespace annulus::kernels::sm90
