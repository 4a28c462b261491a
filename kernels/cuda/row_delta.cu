#include "kernels/cuda/row_delta.hpp"

#include <limits>

#include "kernels/cuda/check.hpp"
#include "kernels/cuda/element.cuh"

// A lane a piece of 16 bytes, as many lanes a row as it has pieces, four rows of loads under way.
namespace annulus::kernels::cuda {
namespace {

constexpr int kPiece = 8;  // elements
constexpr unsigned kRowsAtOnce = 4;
constexpr std::int64_t kMaxGridRows = 65535;

/// [batch, seq, heads], strides in elements. `step` leads from a row to that which a thread takes
/// next, heads innermost, and `wrapped` where that passes the last head.
template <typename Element>
struct Rows {
  Element* data;
  std::int64_t batch, q, head, step, wrapped;

  __device__ Element* at(unsigned b, unsigned row, unsigned heads) const {
    return data + b * batch + row / heads * q + row % heads * head;
  }
};

__device__ inline float2 floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ inline float2 floats(__half2 pair) { return __half22float2(pair); }

template <typename Pair>
__device__ inline float product(const uint4& a, const uint4& b) {
  const auto* left = reinterpret_cast<const Pair*>(&a);
  const auto* right = reinterpret_cast<const Pair*>(&b);
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kPiece / 2; ++i) {
    const float2 x = floats(left[i]);
    const float2 y = floats(right[i]);
    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
  }
  return sum;
}

/// A block of rows of batch row blockIdx.y; heads are innermost, `head_step` those of a step. No
/// division but at the begin: the loads of a thread are under way together.
template <typename Element, typename Pair, int kLanes>
__global__ void sum_pieces(Rows<const Element> o, Rows<const Element> grad_o, Rows<float> delta,
                           unsigned head_step, unsigned heads, unsigned rows, unsigned pieces) {
  constexpr unsigned kGroups = kThreads / kLanes;
  const unsigned lane = threadIdx.x % kLanes;
  const unsigned first = blockIdx.x * kGroups * kRowsAtOnce + threadIdx.x / kLanes;
  const Element* left_row = o.at(blockIdx.y, first, heads) + lane * kPiece;
  const Element* right_row = grad_o.at(blockIdx.y, first, heads) + lane * kPiece;
  float* sum_row = delta.at(blockIdx.y, first, heads);
  unsigned head = first % heads;
  uint4 left[kRowsAtOnce];
  uint4 right[kRowsAtOnce];
  float* sums[kRowsAtOnce];
#pragma unroll
  for (unsigned i = 0; i < kRowsAtOnce; ++i) {
    left[i] = right[i] = make_uint4(0, 0, 0, 0);
    sums[i] = sum_row;
    if (lane < pieces && first + i * kGroups < rows) {
      left[i] = *reinterpret_cast<const uint4*>(left_row);
      right[i] = *reinterpret_cast<const uint4*>(right_row);
    }
    head += head_step;
    const bool wraps = head >= heads;
    if (wraps) head -= heads;
    left_row += wraps ? o.wrapped : o.step;
    right_row += wraps ? grad_o.wrapped : grad_o.step;
    sum_row += wraps ? delta.wrapped : delta.step;
  }
#pragma unroll
  for (unsigned i = 0; i < kRowsAtOnce; ++i) {
    float sum = product<Pair>(left[i], right[i]);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0U, sum, step);
    if (lane == 0 && first + i * kGroups < rows) *sums[i] = sum;
  }
}

/// Whether rows begin at multiples of 16 bytes and have their elements side by side.
bool has_pieces(const ConstTensorView& view) {
  return reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.strides[3] == 1 &&
         view.strides[0] % kPiece == 0 && view.strides[1] % kPiece == 0 &&
         view.strides[2] % kPiece == 0;
}

/// The rows of [batch, seq, heads], of which a thread takes each `apart`-th.
template <typename Element>
Rows<Element> rows_of(Element* data, std::int64_t batch, std::int64_t q, std::int64_t head,
                      std::int64_t heads, std::int64_t apart) {
  const std::int64_t step = apart / heads * q + apart % heads * head;
  return {data, batch, q, head, step, step + q - heads * head};
}

template <typename Element, typename Pair, int kLanes>
void launch(const ConstTensorView& o, const ConstTensorView& grad_o, const TensorView& delta,
            cudaStream_t stream) {
  const std::int64_t heads = o.shape[2];
  const auto rows = static_cast<unsigned>(o.shape[1] * heads);
  constexpr unsigned kGroups = kThreads / kLanes;
  constexpr unsigned kRows = kGroups * kRowsAtOnce;
  const dim3 grid((rows + kRows - 1) / kRows, static_cast<unsigned>(o.shape[0]));
  const auto elements = [&](const ConstTensorView& view) {
    return rows_of(static_cast<const Element*>(view.data), view.strides[0], view.strides[1],
                   view.strides[2], heads, kGroups);
  };
  sum_pieces<Element, Pair, kLanes><<<grid, kThreads, 0, stream>>>(
      elements(o), elements(grad_o),
      rows_of(static_cast<float*>(delta.data), delta.strides[0], delta.strides[2], delta.strides[1],
              heads, kGroups),
      static_cast<unsigned>(kGroups % heads), static_cast<unsigned>(heads), rows,
      static_cast<unsigned>(o.shape[3] / kPiece));
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

template <typename Element, typename Pair>
void launch(const ConstTensorView& o, const ConstTensorView& grad_o, const TensorView& delta,
            cudaStream_t stream) {
  const std::int64_t pieces = o.shape[3] / kPiece;
  if (pieces <= 8) return launch<Element, Pair, 8>(o, grad_o, delta, stream);
  if (pieces <= 16) return launch<Element, Pair, 16>(o, grad_o, delta, stream);
  launch<Element, Pair, 32>(o, grad_o, delta, stream);
}

}  // namespace

bool row_delta(const ConstTensorView& o, const ConstTensorView& grad_o, const TensorView& delta,
               cudaStream_t stream) {
  const bool served = o.dtype == grad_o.dtype && delta.dtype == DType::f32 &&
                      (o.dtype == DType::bf16 || o.dtype == DType::f16) && has_pieces(o) &&
                      has_pieces(grad_o) && o.shape[3] % kPiece == 0 && o.shape[3] <= 32 * kPiece &&
                      o.shape[0] <= kMaxGridRows &&
                      o.shape[1] * o.shape[2] <= std::numeric_limits<std::int32_t>::max();
  if (!served) return false;
  o.dtype == DType::bf16 ? launch<__nv_bfloat16, __nv_bfloat162>(o, grad_o, delta, stream)
                         : launch<__half, __half2>(o, grad_o, delta, stream);
  return true;
}

}  // namespace annulus::kernels::cuda
