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
  int grad_q_rows;  // of a box of dQ, whose columns are 32
  int key_box;      // rows of dK and dV that are written at a time
  void (*launch)(const BackwardParams& params, int clusters, cudaStream_t stream);
  int cluster = 1;      // thread blocks that share a block of keys
  int query_boxes = 1;  // that a block of Q or dO has, one below the other
};

BackwardVariant backward_d64(DType dtype, bool soft_cap);
BackwardVariant backward_d96(DType dtype, bool soft_cap);
BackwardVariant backward_d128(DType dtype, bool soft_cap);
BackwardVariant backward_d192(DType dtype, bool soft_cap);
BackwardVariant backward_d192_v128(DType dtype, bool soft_cap);
BackwardVariant backward_d256(DType dtype, bool soft_cap);

/// Adds the gradients of one call on its stream.
void launch_backward(const BackwardCall& call, const BackwardVariant& variant);

}  // namespace annulus::kernels::sm90
