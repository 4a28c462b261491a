#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "kernels/buffer.hpp"
#include "runtime/context.hpp"
#include "runtime/tensor.hpp"
#include "runtime/transport.hpp"
#include "sharding/execution.hpp"

// Ulysses on device tensors whose heads change hands in parts, while other parts are computed:
// the bits of one part. Several ranks may share one device. Needs a GPU of the Hopper generation:
//   mpirun -n 2 build/test_mpi --gtest_filter='*DeviceHeadParts*'
namespace annulus::testing {
namespace {

constexpr std::int64_t kDim = 128;

Tensor random_values(const Shape& shape, std::uint64_t seed) {
  Tensor values(DType::f32, shape);
  std::mt19937_64 random(seed);
  auto* data = static_cast<float*>(values.view().data);
  for (std::int64_t i = 0; i < shape.elements(); ++i) {
    data[i] = static_cast<float>(static_cast<double>(random() >> 11) * 0x1p-52 - 1.0);
  }
  Tensor narrow(DType::bf16, shape, Device::cuda);
  copy(std::as_const(values).view(), narrow.view());
  return narrow;
}

std::vector<std::byte> bytes_of(const Tensor& tensor) {
  const Tensor host = Tensor::copy_of(tensor.view(), std::nullopt, Device::cpu);
  const auto* data = static_cast<const std::byte*>(host.view().data);
  return {data, data + tensor.shape().elements() * size_bytes(tensor.dtype())};
}

/// One rank's shards, and what a pass over them makes.
class Shards {
 public:
  Shards(const PlanRequest& request, int rank)
      : q_shape_{1, request.q_layout.rows(rank), request.q_heads, kDim},
        kv_shape_{1, request.kv_layout.rows(rank), request.kv_heads, kDim},
        statistics_{1, request.q_heads, request.q_layout.rows(rank)} {
    const auto seed = static_cast<std::uint64_t>(rank) * 4;
    q_ = random_values(q_shape_, seed);
    k_ = random_values(kv_shape_, seed + 1);
    v_ = random_values(kv_shape_, seed + 2);
    grad_o_ = random_values(q_shape_, seed + 3);
  }

  /// O, LSE, dQ, dK, dV.
  std::vector<std::vector<std::byte>> run(Communicator& ranks, const AttentionPlan& plan,
                                          int parts) const {
    Tensor o(DType::bf16, q_shape_, Device::cuda), lse(DType::f32, statistics_, Device::cuda);
    Tensor delta(DType::f32, statistics_, Device::cuda);
    Tensor grad_q(DType::f32, q_shape_, Device::cuda), grad_k(DType::f32, kv_shape_, Device::cuda);
    Tensor grad_v(DType::f32, kv_shape_, Device::cuda);
    for (Tensor* tensor : {&o, &lse}) {  // NaN
      fill_bytes(tensor->view().data, Device::cuda, 0xff,
                 tensor->shape().elements() * size_bytes(tensor->dtype()));
    }
    for (Tensor* gradient : {&grad_q, &grad_k, &grad_v}) clear(gradient->view());
    ExecuteOptions options;
    options.head_parts = parts;
    ForwardCall forward;
    forward.problem.q = q_.view();
    forward.problem.k = k_.view();
    forward.problem.v = v_.view();
    forward.problem.scale = 1.0F / std::sqrt(static_cast<float>(kDim));
    forward.o = o.view();
    forward.log_sum_exp = lse.view();
    execute_forward(ranks, plan, forward, options);
    attention_delta(o.view(), grad_o_.view(), delta.view());
    BackwardCall backward;
    backward.problem = forward.problem;
    backward.grad_o = grad_o_.view();
    backward.log_sum_exp = lse.view();
    backward.delta = delta.view();
    backward.grad_q = grad_q.view();
    backward.grad_k = grad_k.view();
    backward.grad_v = grad_v.view();
    backward.deterministic = true;
    execute_backward(ranks, plan, backward, options);
    return {bytes_of(o), bytes_of(lse), bytes_of(grad_q), bytes_of(grad_k), bytes_of(grad_v)};
  }

 private:
  Shape q_shape_, kv_shape_, statistics_;
  Tensor q_, k_, v_, grad_o_;
};

class DeviceHeadParts : public ::testing::TestWithParam<Transport> {};

TEST_P(DeviceHeadParts, GiveTheBitsOfOnePart) {
  Context context;
  if (context.device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  const int ranks = context.size();
  const std::unique_ptr<Communicator> devices =
      make_device_communicator(context.world(), GetParam(), 1);
  const std::int64_t seq = 1500 * std::int64_t{ranks} + 3;
  auto request = std::make_shared<PlanRequest>();
  request->scheme = Scheme::ulysses;
  request->q_layout = request->kv_layout = SequenceLayout::zigzag(seq, ranks);
  AttentionMask mask;
  mask.causal = true;
  request->mask = make_slices(mask, 1, seq, seq);
  request->q_heads = 8 * std::int64_t{ranks};
  request->kv_heads = 4 * std::int64_t{ranks};
  const AttentionPlan plan(request, context.rank());
  const Shards shards(*request, context.rank());
  const auto expected = shards.run(*devices, plan, 1);
  for (const int parts : {2, 3, 4, 4, 4, 4}) {
    const auto found = shards.run(*devices, plan, parts);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(found[i] == expected[i], true)
          << parts << " parts, result " << i << " of O, LSE, dQ, dK, dV";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Transports, DeviceHeadParts,
                         ::testing::Values(Transport::peer, Transport::nccl, Transport::mpi),
                         [](const auto& info) { return std::string(name(info.param)); });

}  // namespace
}  // namespace annulus::testing
