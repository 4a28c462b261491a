#include "kernels/cuda/check.hpp"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/row_delta.hpp"
#include "kernels/cuda_support.hpp"

// What stands between the attention kernels of a ring: merging, finishing and the row sums of the
// backward. One warp a row of [batch, seq, heads, dim]; memory-bound.
namespace annulus::kernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = kThreads / kWarp;

struct RowIndex {
  std::int64_t b;
  std::int64_t q;
  std::int64_t h;
};

struct StateView {
  DeviceView accumulator;
  DeviceView max;
  DeviceView sum;

  static StateView of(const AttentionState& state) {
    return {DeviceView::of(state.accumulator), DeviceView::of(state.row_max),
            DeviceView::of(state.row_sum)};
  }
};

__device__ RowIndex row_index(std::int64_t row, const DeviceView& view) {
  const std::int64_t h = row % view.shape[2];
  const std::int64_t rest = row / view.shape[2];
  return {rest / view.shape[1], rest % view.shape[1], h};
}

__device__ std::int64_t row_at(const DeviceView& view, const RowIndex& row) {
  return row.b * view.strides[0] + row.q * view.strides[1] + row.h * view.strides[2];
}

__device__ std::int64_t statistic_at(const DeviceView& view, const RowIndex& row) {
  return row.b * view.strides[0] + row.h * view.strides[1] + row.q * view.strides[2];
}

// fmaxf drops a NaN; here it must reach the output.
__device__ float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

__device__ std::int64_t first_row() {
  return blockIdx.x * std::int64_t{kRowsPerBlock} + threadIdx.x / kWarp;
}

__device__ std::int64_t row_step() { return static_cast<std::int64_t>(gridDim.x) * kRowsPerBlock; }

__global__ void merge_rows(StateView from, StateView into, std::int64_t rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (std::int64_t r = first_row(); r < rows; r += row_step()) {
    const RowIndex row = row_index(r, into.accumulator);
    const float from_max = load_float(from.max, statistic_at(from.max, row));
    const float into_max = load_float(into.max, statistic_at(into.max, row));
    const float max = max_or_nan(from_max, into_max);
    if (max == -INFINITY) continue;
    const float from_weight = expf(from_max - max);
    const float into_weight = expf(into_max - max);
    const std::int64_t from_at = row_at(from.accumulator, row);
    const std::int64_t into_at = row_at(into.accumulator, row);
    for (std::int64_t d = lane; d < into.accumulator.shape[3]; d += kWarp) {
      const std::int64_t at = into_at + d * into.accumulator.strides[3];
      const float theirs = load_float(from.accumulator, from_at + d * from.accumulator.strides[3]);
      store_float(into.accumulator, at,
                  into_weight * load_float(into.accumulator, at) + from_weight * theirs);
    }
    __syncwarp();  // every lane has read the statistics
    if (lane != 0) continue;
    const std::int64_t sum_at = statistic_at(into.sum, row);
    const float from_sum = load_float(from.sum, statistic_at(from.sum, row));
    store_float(into.sum, sum_at,
                into_weight * load_float(into.sum, sum_at) + from_weight * from_sum);
    store_float(into.max, statistic_at(into.max, row), max);
  }
}

__global__ void finish_rows(StateView state, DeviceView o, DeviceView lse, std::int64_t rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (std::int64_t r = first_row(); r < rows; r += row_step()) {
    const RowIndex row = row_index(r, state.accumulator);
    const float max = load_float(state.max, statistic_at(state.max, row));
    const float sum = load_float(state.sum, statistic_at(state.sum, row));
    const bool empty = max == -INFINITY;
    if (lse.data != nullptr && lane == 0) {
      store_float(lse, statistic_at(lse, row), empty ? -INFINITY : max + logf(sum));
    }
    if (o.data == nullptr) continue;
    const float factor = empty ? 0.0F : 1.0F / sum;
    const std::int64_t from_at = row_at(state.accumulator, row);
    const std::int64_t to_at = row_at(o, row);
    for (std::int64_t d = lane; d < o.shape[3]; d += kWarp) {
      const float value = load_float(state.accumulator, from_at + d * state.accumulator.strides[3]);
      store_float(o, to_at + d * o.strides[3], empty ? 0.0F : value * factor);
    }
  }
}

__global__ void delta_rows(DeviceView o, DeviceView grad_o, DeviceView delta, std::int64_t rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (std::int64_t r = first_row(); r < rows; r += row_step()) {
    const RowIndex row = row_index(r, o);
    const std::int64_t o_at = row_at(o, row);
    const std::int64_t grad_at = row_at(grad_o, row);
    float sum = 0.0F;
    for (std::int64_t d = lane; d < o.shape[3]; d += kWarp) {
      sum += load_float(o, o_at + d * o.strides[3]) *
             load_float(grad_o, grad_at + d * grad_o.strides[3]);
    }
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0U, sum, step);
    if (lane == 0) store_float(delta, statistic_at(delta, row), sum);
  }
}

// One block a head, summed in a fixed order: the same bits every time.
__global__ void sink_gradient_of_head(DeviceView sinks, DeviceView lse, DeviceView delta,
                                      DeviceView grad_sinks) {
  __shared__ float partial[kThreads];
  const std::int64_t h = blockIdx.x;
  const float sink = load_float(sinks, h * sinks.strides[0]);
  const std::int64_t queries = delta.shape[2];
  float sum = 0.0F;
  for (std::int64_t i = threadIdx.x; i < delta.shape[0] * queries; i += kThreads) {
    const RowIndex row{i / queries, i % queries, h};
    const float value = load_float(lse, statistic_at(lse, row));
    if (value == -INFINITY) continue;
    sum += expf(sink - value) * load_float(delta, statistic_at(delta, row));
  }
  partial[threadIdx.x] = sum;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  if (threadIdx.x != 0) return;
  const std::int64_t at = h * grad_sinks.strides[0];
  store_float(grad_sinks, at, load_float(grad_sinks, at) - partial[0]);
}

std::int64_t rows_of(const ConstTensorView& view) {
  return view.shape[0] * view.shape[1] * view.shape[2];
}

unsigned row_blocks(std::int64_t rows) { return blocks_for(rows * kWarp); }

cudaStream_t handle_of(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

}  // namespace

void merge(const AttentionState& from, const AttentionState& into, Stream stream) {
  const std::int64_t rows = rows_of(into.accumulator);
  if (rows == 0) return;
  merge_rows<<<row_blocks(rows), kThreads, 0, handle_of(stream)>>>(StateView::of(from),
                                                                   StateView::of(into), rows);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

void finish(const AttentionState& state, TensorView o, TensorView log_sum_exp, Stream stream) {
  const std::int64_t rows = rows_of(state.accumulator);
  if (rows == 0) return;
  finish_rows<<<row_blocks(rows), kThreads, 0, handle_of(stream)>>>(
      StateView::of(state), DeviceView::of(o), DeviceView::of(log_sum_exp), rows);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

void delta(ConstTensorView o, ConstTensorView grad_o, TensorView delta, Stream stream) {
  const std::int64_t rows = rows_of(o);
  if (rows == 0 || row_delta(o, grad_o, delta, handle_of(stream))) return;
  delta_rows<<<row_blocks(rows), kThreads, 0, handle_of(stream)>>>(
      DeviceView::of(o), DeviceView::of(grad_o), DeviceView::of(delta), rows);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

void sink_gradient(ConstTensorView sinks, ConstTensorView log_sum_exp, ConstTensorView delta,
                   TensorView grad_sinks, Stream stream) {
  if (delta.shape[1] == 0) return;
  sink_gradient_of_head<<<static_cast<unsigned>(delta.shape[1]), kThreads, 0, handle_of(stream)>>>(
      DeviceView::of(sinks), DeviceView::of(log_sum_exp), DeviceView::of(delta),
      DeviceView::of(grad_sinks));
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

}  // namespace annulus::kernels::cuda
