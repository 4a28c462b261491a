#pragma once

#include <cuda_runtime.h>

#include "kernels/types.hpp"

namespace annulus::kernels::cuda {

/// o = grad_o·delta / |grad_o|², the shortest vector with Σ_d grad_o·o = delta: for code that reads
/// O only to compute delta. Rounding o costs delta a part in 2^9 at most in bf16, no more than the
/// rounding of the true O does. [batch, seq, heads, dim], delta [batch, heads, seq].
void output_of_delta(const ConstTensorView& grad_o, const ConstTensorView& delta,
                     const TensorView& o, cudaStream_t stream);

}  // namespace annulus::kernels::cuda
