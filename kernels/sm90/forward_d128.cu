#include "kernels/sm90/forward_dispatch.cuh"

namespace annulus::kernels::sm90 {
namespace {

// 128 rows read 32 bytes of keys a clock and multiprocessor from L2, all that it gives; 192 rows
// read a third less.
template <typename Element>
using Wide = ForwardTile<Element, 128, 128, 3, 128, 2, 2, false, false>;
template <typename Element>
using Narrow = ForwardTile<Element, 128, 128, 2, 128, 2, 2, true>;

template <typename Element>
ForwardVariants variants() {
  return {forward_variant<Wide<Element>>(), forward_variant<Narrow<Element>>()};
}

}  // namespace

ForwardVariants forward_d128(DType dtype) {
  return dtype == DType::bf16 ? variants<__nv_bfloat16>() : variants<__half>();
}

}  // namespace annulus::kernels::sm90
