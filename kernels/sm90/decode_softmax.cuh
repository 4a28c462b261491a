#pragma once

#include "kernels/sm90/forward_softmax.cuh"

/// Softmax of decode, which waits for memory: maxima are exact, where the forward kernel bounds
/// them. Written out, though the exponentials are the same: through a function of their own the
/// assembler numbers registers anew, and this is the code that was measured.
namespace annulus::kernels::sm90 {

/// Turns scores into exp2(exp_scale·(s − max)) and adds them up. Returns whether some row of the
/// warp renewed its maximum: `factor` then holds what earlier sums must be multiplied by. With
/// headroom that is rare after a tile's first blocks, and the multiplications of O are saved.
template <int kCount>
__device__ inline bool exact_softmax_step(float (&s)[kCount], RowStatistics& rows, float exp_scale,
                                          float headroom, float (&factor)[2]) {
  float block_max[2];
  block_maxima(s, block_max);
  const bool grown = block_max[0] > rows.max[0] + headroom || block_max[1] > rows.max[1] + headroom;
  const bool renewed = __any_sync(0xffffffffU, grown);
  if (renewed) [[unlikely]] {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float now = fmaxf(rows.max[row], block_max[row]);
      const float base = now == -INFINITY ? 0.0F : now;
      factor[row] = exp2_approx((rows.max[row] - base) * exp_scale);
      rows.max[row] = now;
      rows.sum[row] *= factor[row];
    }
  }
  float scaled_max[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    scaled_max[row] = rows.max[row] == -INFINITY ? 0.0F : rows.max[row] * exp_scale;
  }
  float partial[2] = {0.0F, 0.0F};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = (i / 2) % 2;
    s[i] = exp2_approx(fmaf(s[i], exp_scale, -scaled_max[row]));
    if (i % 2 == 0) {
      rows.sum[row] += s[i];
    } else {
      partial[row] += s[i];
    }
  }
  rows.sum[0] += partial[0];
  rows.sum[1] += partial[1];
  return renewed;
}

}  // namespace annulus::kernels::sm90
