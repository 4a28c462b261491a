#include "runtime/call_tensors.hpp"

namespace annulus {

ConstTensorView in_bthd(const ConstTensorView& view, DimOrder order) {
  if (order == DimOrder::bthd || view.rank() <= 2) return view;
  if (order == DimOrder::bhtd) return view.transposed(1, 2);
  const Shape& n = view.shape;
  const Shape& s = view.strides;
  return {
      view.data, view.dtype, {1, n[0], n[1], n[2]}, {n[0] * s[0], s[0], s[1], s[2]}, view.device};
}

TensorView readable(const ConstTensorView& view) {
  return {const_cast<void*>(view.data), view.dtype, view.shape, view.strides, view.device};
}

}  // namespace annulus
