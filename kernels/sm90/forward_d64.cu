#include "kernels/sm90/forward_dispatch.cuh"

namespace annulus::kernels::sm90 {
namespace {

// Long blocks amortise what is done once a block; shorter ones, which leave room for overlap, are
// as fast where they waste less of the last.
template <typename Element>
using Wide = ForwardTile<Element, 64, 64, 3, 192, 2, 2, true, false>;
template <typename Element>
using Narrow = ForwardTile<Element, 64, 64, 3, 128, 2, 2, true>;

template <typename Element>
ForwardVariants variants() {
  return {forward_variant<Wide<Element>>(), forward_variant<Narrow<Element>>(), 1.0};
}

}  // namespace

ForwardVariants forward_d64(DType dtype) {
  return dtype == DType::bf16 ? variants<__nv_bfloat16>() : variants<__half>();
}

}  // namespace annulus::kernels::sm90
