#include "tests/runtime/device_shards.hpp"

#include <cmath>
#include <random>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"

namespace annulus::testing {

void randomize(const TensorView& values, std::uint64_t seed) {
  Tensor host(DType::f32, values.shape);
  std::mt19937_64 random(seed);
  auto* data = static_cast<float*>(host.view().data);
  for (std::int64_t i = 0; i < values.shape.elements(); ++i) {
    data[i] = static_cast<float>(static_cast<double>(random() >> 11) * 0x1p-52 - 1.0);
  }
  copy(std::as_const(host).view(), values);
}

double largest_difference(const Tensor& a, const Tensor& b) {
  const Tensor left = Tensor::copy_of(a.view(), DType::f32, Device::cpu);
  const Tensor right = Tensor::copy_of(b.view(), DType::f32, Device::cpu);
  const auto* x = static_cast<const float*>(left.view().data);
  const auto* y = static_cast<const float*>(right.view().data);
  double largest = 0.0;
  for (std::int64_t i = 0; i < a.shape().elements(); ++i) {
    const double difference = std::abs(static_cast<double>(x[i]) - y[i]);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}

DeviceShards::DeviceShards(const PlanRequest& request, int rank, std::int64_t head_dim,
                           bool head_major)
    : q_shape_{request.batch, request.q_layout.rows(rank), request.q_heads, head_dim},
      kv_shape_{request.batch, request.kv_layout.rows(rank), request.kv_heads, head_dim},
      head_major_(head_major) {
  Shape held = q_shape_;
  if (head_major) std::swap(held[1], held[2]);
  const Shape statistics{q_shape_[0], q_shape_[2], q_shape_[1]};
  q_ = Tensor(DType::bf16, held, Device::cuda);
  k_ = Tensor(DType::bf16, kv_shape_, Device::cuda);
  v_ = Tensor(DType::bf16, kv_shape_, Device::cuda);
  grad_o_ = Tensor(DType::bf16, q_shape_, Device::cuda);
  o_ = Tensor(DType::bf16, held, Device::cuda);
  lse_ = Tensor(DType::f32, statistics, Device::cuda);
  delta_ = Tensor(DType::f32, statistics, Device::cuda);
}

void DeviceShards::change(std::uint64_t seed) {
  seed_ = seed;
  randomize(q_.view(), seed);
  randomize(k_.view(), seed + 1000);
  randomize(v_.view(), seed + 2000);
  randomize(grad_o_.view(), seed + 3000);
}

TensorView DeviceShards::seen(Tensor& rows) const {
  return head_major_ ? rows.view().transposed(1, 2) : rows.view();
}

AttentionProblem DeviceShards::problem() {
  AttentionProblem problem;
  problem.q = seen(q_);
  problem.k = k_.view();
  problem.v = v_.view();
  problem.scale = 1.0F / std::sqrt(static_cast<float>(q_shape_[3]));
  return problem;
}

Tensor DeviceShards::forward(Communicator& ranks, const AttentionPlan& plan,
                             const ExecuteOptions& options) {
  fill_bytes(o_.view().data, Device::cuda, 0xff, o_.shape().elements() * 2);
  fill_bytes(lse_.view().data, Device::cuda, 0xff, lse_.shape().elements() * 4);
  ForwardCall call;
  call.problem = problem();
  call.o = seen(o_);
  call.log_sum_exp = lse_.view();
  execute_forward(ranks, plan, call, options);
  attention_delta(seen(o_), grad_o_.view(), delta_.view());
  return Tensor::copy_of(seen(o_), DType::f32, Device::cpu);
}

std::vector<Tensor> DeviceShards::backward(Communicator& ranks, const AttentionPlan& plan,
                                           const ExecuteOptions& options) {
  std::vector<Tensor> gradients;
  for (const Shape& shape : {q_shape_, kv_shape_, kv_shape_}) {
    gradients.emplace_back(DType::f32, shape, Device::cuda);
    randomize(gradients.back().view(), seed_ + 4000 + gradients.size());
  }
  BackwardCall call;
  call.problem = problem();
  call.grad_o = grad_o_.view();
  call.log_sum_exp = lse_.view();
  call.delta = delta_.view();
  call.grad_q = gradients[0].view();
  call.grad_k = gradients[1].view();
  call.grad_v = gradients[2].view();
  execute_backward(ranks, plan, call, options);
  return gradients;
}

}  // namespace annulus::testing
