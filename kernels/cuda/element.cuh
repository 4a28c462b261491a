#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/types.hpp"

namespace annulus::kernels::cuda {

inline constexpr int kThreads = 256;

/// Enough blocks for `items` threads, at most 2^31 - 1: kernels stride over what is left.
inline unsigned blocks_for(std::int64_t items) {
  const std::int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

/// What a kernel needs of a view.
struct DeviceView {
  void* data;
  DType dtype;
  int rank;
  std::int64_t shape[Shape::kMaxRank];
  std::int64_t strides[Shape::kMaxRank];

  template <typename View>
  static DeviceView of(const View& view) {
    DeviceView result{
        const_cast<void*>(static_cast<const void*>(view.data)), view.dtype, view.rank(), {}, {}};
    for (int dim = 0; dim < view.rank(); ++dim) {
      result.shape[dim] = view.shape[dim];
      result.strides[dim] = view.strides[dim];
    }
    return result;
  }
};

/// Element `i` of floating data; the dtype is the same for all threads, so the branch is free.
__device__ inline float load_float(const DeviceView& view, std::int64_t i) {
  switch (view.dtype) {
    case DType::f32:
      return static_cast<const float*>(view.data)[i];
    case DType::f16:
      return __half2float(static_cast<const __half*>(view.data)[i]);
    case DType::bf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(view.data)[i]);
    default:
      return static_cast<float>(static_cast<const double*>(view.data)[i]);
  }
}

__device__ inline void store_float(const DeviceView& view, std::int64_t i, float value) {
  switch (view.dtype) {
    case DType::f32:
      static_cast<float*>(view.data)[i] = value;
      break;
    case DType::f16:
      static_cast<__half*>(view.data)[i] = __float2half_rn(value);
      break;
    case DType::bf16:
      static_cast<__nv_bfloat16*>(view.data)[i] = __float2bfloat16_rn(value);
      break;
    default:
      static_cast<double*>(view.data)[i] = static_cast<double>(value);
  }
}

}  // namespace annulus::kernels::cuda
