#pragma once

#include <cuda_runtime.h>

#include "kernels/types.hpp"

namespace annulus::kernels::cuda {

/// Copies device views of equal shape, any strides and dtypes.
void strided_copy(const ConstTensorView& from, const TensorView& to, cudaStream_t stream);

}  // namespace annulus::kernels::cuda
