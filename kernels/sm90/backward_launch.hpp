#pragma once

#include <cuda_runtime.h>

#include "kernels/attention.hpp"
#include "kernels/sm90/backward_params.hpp"

/// From a backward call to a launch: tensor maps, work table, parameters.
namespace annulus::kernels::sm90 {

/// A compiled tile shape.
struct BackwardVariant {
  int queries;     // at a time
  int keys;        // of a block
  int qk_columns;  // columns of a box of Q or K in shared memory
  int v_columns;
  void (*launch)(const BackwardParams& params, bool soft_cap, int blocks, cudaStream_t stream);
};

BackwardVariant backward_d64(DType dtype);
BackwardVariant backward_d96(DType dtype);
BackwardVariant backward_d128(DType dtype);
BackwardVariant backward_d192(DType dtype);
BackwardVariant backward_d192_v128(DType dtype);
BackwardVariant backward_d256(DType dtype);

/// Adds the gradients of one call on its stream.
void launch_backward(const BackwardCall& call, const BackwardVariant& variant);

}  // namespace annulus::kernels::sm90
