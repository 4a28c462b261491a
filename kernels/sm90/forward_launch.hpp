#pragma once

#include <cuda_runtime.h>

#include "kernels/attention.hpp"
#include "kernels/sm90/forward_params.hpp"

/// From a call to a launch: tensor maps, work table, parameters.
namespace annulus::kernels::sm90 {

/// A compiled tile shape.
struct ForwardVariant {
  int warpgroups;    // 64 rows each
  int block;         // keys at a time
  bool passes_over;  // warpgroups without rows in a tile, or that see nothing of a block, go on
  int qk_columns;    // columns of a box of Q or K in shared memory
  int v_columns;
  /// Begins where the launch before it ends.
  void (*launch)(const ForwardParams& params, bool soft_cap, int blocks, cudaStream_t stream);
};

/// The variants of one pair of head dimensions for one element type.
struct ForwardVariants {
  ForwardVariant wide;     // most rows: least L2 traffic
  ForwardVariant narrow;   // fewer rows: least waste where a tile meets few keys
  double wide_gain = 1.1;  // in rate, of wide over narrow (measured)
};

ForwardVariants forward_d64(DType dtype);
ForwardVariants forward_d96(DType dtype);
ForwardVariants forward_d128(DType dtype);
ForwardVariants forward_d192(DType dtype);
ForwardVariants forward_d192_v128(DType dtype);
ForwardVariants forward_d256(DType dtype);

/// Keys and values of one segment and the slices over them, in the segment's own key indices.
/// With `ready`, reading waits until *ready has reached ready_value (compared modulo 2^32).
struct ForwardSegment {
  ConstTensorView k;
  ConstTensorView v;
  SliceList mask;
  const std::uint32_t* ready = nullptr;
  std::uint32_t ready_value = 0;
};

/// Picks the variant by the keys that a tile meets, and launches on the call's stream.
void launch_forward(const ForwardCall& call, std::span<const ForwardSegment> segments,
                    const ForwardVariants& variants);

}  // namespace annulus::kernels::sm90
