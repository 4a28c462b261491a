#include "launch/rank_attention.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "kernels/buffer.hpp"

namespace annulus::launch {
namespace {

// A block of values again and again: drawing all would take longer than the measurement.
Tensor random_tensor(DType dtype, const Shape& shape, std::uint64_t seed, Device device) {
  const std::int64_t count = std::min<std::int64_t>(shape.elements(), std::int64_t{1} << 20);
  Tensor block(DType::f32, {count});
  std::mt19937_64 random(seed);
  auto* data = static_cast<float*>(block.view().data);
  for (std::int64_t i = 0; i < count; ++i) {
    data[i] = static_cast<float>(static_cast<double>(random() >> 11) * 0x1p-52 - 1.0);
  }
  Tensor values(dtype, shape, device);
  const TensorView flat(values.view().data, dtype, {shape.elements()}, device);
  copy(std::as_const(block).view(), flat.slice(0, {0, count}));
  for (std::int64_t begin = count; begin < shape.elements(); begin += count) {
    const Span span{begin, std::min(begin + count, shape.elements())};
    copy(flat.slice(0, {0, span.size()}), flat.slice(0, span));  // where they lie
  }
  return values;
}

}  // namespace

RankAttention::RankAttention(const PlanRequest& request, const AttentionSizes& sizes, DType dtype,
                             int rank, Device device)
    : RankAttention(request, sizes, dtype, rank, device, request.q_layout.rows(rank),
                    request.kv_layout.rows(rank)) {}

RankAttention::RankAttention(const PlanRequest& request, const AttentionSizes& sizes, DType dtype,
                             int rank, Device device, std::int64_t q_rows, std::int64_t kv_rows)
    : q_rows_{request.batch, q_rows, request.q_heads, sizes.head_dim},
      kv_rows_{request.batch, kv_rows, request.kv_heads, sizes.head_dim},
      statistics_{request.batch, request.q_heads, q_rows} {
  const auto seed = static_cast<std::uint64_t>(rank) * 8;
  q_ = random_tensor(dtype, q_rows_, seed, device);
  k_ = random_tensor(dtype, kv_rows_, seed + 1, device);
  v_ = random_tensor(dtype, kv_rows_, seed + 2, device);
  grad_o_ = random_tensor(dtype, q_rows_, seed + 3, device);
  o_ = Tensor(dtype, q_rows_, device);
  lse_ = Tensor(DType::f32, statistics_, device);
  delta_ = Tensor(DType::f32, statistics_, device);
  grad_q_ = Tensor(DType::f32, q_rows_, device);
  grad_k_ = Tensor(DType::f32, kv_rows_, device);
  grad_v_ = Tensor(DType::f32, kv_rows_, device);
  fill_bytes(o_.view().data, device, 0, o_.shape().elements() * size_bytes(dtype));
  for (Tensor* gradient : {&grad_q_, &grad_k_, &grad_v_}) {
    fill_bytes(gradient->view().data, device, 0, gradient->shape().elements() * 4);
  }
}

ForwardCall RankAttention::forward() {
  ForwardCall call;
  call.problem.q = q_.view();
  call.problem.k = k_.view();
  call.problem.v = v_.view();
  call.problem.scale = 1.0F / std::sqrt(static_cast<float>(q_rows_[3]));
  call.o = o_.view();
  call.log_sum_exp = lse_.view();
  return call;
}

BackwardCall RankAttention::backward() {
  BackwardCall call;
  call.problem = forward().problem;
  call.grad_o = grad_o_.view();
  call.log_sum_exp = lse_.view();
  call.delta = delta_.view();
  call.o = o_.view();
  call.grad_q = grad_q_.view();
  call.grad_k = grad_k_.view();
  call.grad_v = grad_v_.view();
  return call;
}

void RankAttention::compute_delta() { attention_delta(o_.view(), grad_o_.view(), delta_.view()); }

}  // namespace annulus::launch
