#include "kernels/cuda/check.hpp"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/output_of_delta.hpp"

// One warp a row; memory-bound.
namespace annulus::kernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = kThreads / kWarp;

__global__ void project(DeviceView grad_o, DeviceView delta, DeviceView o, std::int64_t rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kRowsPerBlock;
  for (std::int64_t r = blockIdx.x * std::int64_t{kRowsPerBlock} + threadIdx.x / kWarp; r < rows;
       r += step) {
    const std::int64_t h = r % o.shape[2];
    const std::int64_t q = r / o.shape[2] % o.shape[1];
    const std::int64_t b = r / o.shape[2] / o.shape[1];
    const std::int64_t from = b * grad_o.strides[0] + q * grad_o.strides[1] + h * grad_o.strides[2];
    const std::int64_t to = b * o.strides[0] + q * o.strides[1] + h * o.strides[2];
    float square = 0.0F;
    for (std::int64_t d = lane; d < o.shape[3]; d += kWarp) {
      const float value = load_float(grad_o, from + d * grad_o.strides[3]);
      square += value * value;
    }
    for (int half = kWarp / 2; half > 0; half /= 2) square += __shfl_xor_sync(~0U, square, half);
    const float wanted =
        load_float(delta, b * delta.strides[0] + h * delta.strides[1] + q * delta.strides[2]);
    const float factor = square == 0.0F ? 0.0F : wanted / square;
    for (std::int64_t d = lane; d < o.shape[3]; d += kWarp) {
      store_float(o, to + d * o.strides[3],
                  factor * load_float(grad_o, from + d * grad_o.strides[3]));
    }
  }
}

}  // namespace

void output_of_delta(const ConstTensorView& grad_o, const ConstTensorView& delta,
                     const TensorView& o, cudaStream_t stream) {
  const std::int64_t rows = o.shape[0] * o.shape[1] * o.shape[2];
  if (rows == 0) return;
  project<<<blocks_for(rows * kWarp), kThreads, 0, stream>>>(
      DeviceView::of(grad_o), DeviceView::of(delta), DeviceView::of(o), rows);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

}  // namespace annulus::kernels::cuda
