#pragma once

#include "kernels/types.hpp"

namespace annulus::kernels {

/// to = from, for host views of equal shape and any strides; equal dtypes keep their bits.
void host_copy(const ConstTensorView& from, const TensorView& to);

/// into += from, for f32 host views of equal shape and any strides.
void host_accumulate(const ConstTensorView& from, const TensorView& into);

}  // namespace annulus::kernels
