#pragma once

#include <cuda_runtime.h>

#include "kernels/types.hpp"

namespace annulus::kernels::cuda {

/// delta[b,h,q] = Σ_d o·grad_o of bf16 or f16 rows that pieces of 16 bytes make up: read as such,
/// at the rate of memory. False where the tensors are not of that kind, with nothing done.
bool row_delta(const ConstTensorView& o, const ConstTensorView& grad_o, const TensorView& delta,
               cudaStream_t stream);

}  // namespace annulus::kernels::cuda
