#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "kernels/buffer.hpp"
#include "runtime/context.hpp"
#include "runtime/tensor.hpp"
#include "runtime/transport.hpp"
#include "sharding/execution.hpp"
#include "sharding/memory_model.hpp"

// A ring's backward pass where one device has all ranks' memory: each rank adds to everybody's
// gradients at once. Held against partials that are sent back. Needs a GPU of the Hopper
// generation, which ranks share:
//   mpirun -n 4 build/test_mpi --gtest_filter='*DeviceJointBackward*'
namespace annulus::testing {
namespace {

constexpr std::int64_t kDim = 64;

Tensor random_values(DType dtype, const Shape& shape, std::uint64_t seed) {
  Tensor values(DType::f32, shape);
  std::mt19937_64 random(seed);
  auto* data = static_cast<float*>(values.view().data);
  for (std::int64_t i = 0; i < shape.elements(); ++i) {
    data[i] = static_cast<float>(static_cast<double>(random() >> 11) * 0x1p-52 - 1.0);
  }
  Tensor result(dtype, shape, Device::cuda);
  copy(std::as_const(values).view(), result.view());
  return result;
}

double largest_difference(const Tensor& a, const Tensor& b) {
  const Tensor left = Tensor::copy_of(a.view(), std::nullopt, Device::cpu);
  const Tensor right = Tensor::copy_of(b.view(), std::nullopt, Device::cpu);
  const auto* x = static_cast<const float*>(left.view().data);
  const auto* y = static_cast<const float*>(right.view().data);
  double largest = 0.0;
  for (std::int64_t i = 0; i < a.shape().elements(); ++i) {
    const double difference = std::abs(static_cast<double>(x[i]) - y[i]);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}

/// One rank's shards. Gradients begin with numbers, to which a pass adds.
class Shards {
 public:
  Shards(const PlanRequest& request, int rank, std::uint64_t seed)
      : q_shape_{request.batch, request.q_layout.rows(rank), request.q_heads, kDim},
        kv_shape_{request.batch, request.kv_layout.rows(rank), request.kv_heads, kDim},
        seed_(seed + static_cast<std::uint64_t>(rank) * 8) {
    q_ = random_values(DType::bf16, q_shape_, seed_);
    k_ = random_values(DType::bf16, kv_shape_, seed_ + 1);
    v_ = random_values(DType::bf16, kv_shape_, seed_ + 2);
    grad_o_ = random_values(DType::bf16, q_shape_, seed_ + 3);
    const Shape statistics{q_shape_[0], q_shape_[2], q_shape_[1]};
    lse_ = Tensor(DType::f32, statistics, Device::cuda);
    delta_ = Tensor(DType::f32, statistics, Device::cuda);
  }

  void forward(Communicator& ranks, const AttentionPlan& plan) {
    Tensor o(DType::bf16, q_shape_, Device::cuda);
    ForwardCall call;
    call.problem = problem();
    call.o = o.view();
    call.log_sum_exp = lse_.view();
    execute_forward(ranks, plan, call);
    attention_delta(o.view(), grad_o_.view(), delta_.view());
  }

  /// dQ, dK, dV.
  std::vector<Tensor> backward(Communicator& ranks, const AttentionPlan& plan,
                               const ExecuteOptions& options) const {
    std::vector<Tensor> gradients;
    gradients.push_back(random_values(DType::f32, q_shape_, seed_ + 4));
    gradients.push_back(random_values(DType::f32, kv_shape_, seed_ + 5));
    gradients.push_back(random_values(DType::f32, kv_shape_, seed_ + 6));
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

 private:
  AttentionProblem problem() const {
    AttentionProblem problem;
    problem.q = q_.view();
    problem.k = k_.view();
    problem.v = v_.view();
    problem.scale = 1.0F / std::sqrt(static_cast<float>(kDim));
    return problem;
  }

  Shape q_shape_, kv_shape_;
  std::uint64_t seed_;
  Tensor q_, k_, v_, grad_o_, lse_, delta_;
};

std::shared_ptr<PlanRequest> request_of(int ranks, std::int64_t seq, const AttentionMask& mask) {
  auto request = std::make_shared<PlanRequest>();
  request->q_layout = request->kv_layout = SequenceLayout::zigzag(seq, ranks);
  request->batch = 2;
  request->mask = make_slices(mask, request->batch, seq, seq);
  request->q_heads = 6;
  request->kv_heads = 3;  // rows of no power of two
  return request;
}

TEST(DeviceJointBackward, AddsWhatPartialsAddWhenTheyReturn) {
  Context context;
  if (context.device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  const int ranks = context.size();
  const std::unique_ptr<Communicator> devices =
      make_device_communicator(context.world(), Transport::peer, 1);
  AttentionMask causal, window, documents;
  causal.causal = window.causal = documents.causal = true;
  window.window_left = 150;
  // Windows are used again, for fewer rows and for more, the same and other masks.
  for (const std::int64_t each : {500, 500, 130, 700}) {
    const std::int64_t seq = each * ranks + 3;
    const std::int64_t offsets[2][3] = {{0, seq / 3, seq}, {0, seq / 2 + 5, seq}};
    documents.q_segments = {segments_of_offsets(offsets[0], seq),
                            segments_of_offsets(offsets[1], seq)};
    documents.kv_segments = documents.q_segments;
    for (const AttentionMask& mask : {AttentionMask(), causal, window, documents}) {
      const auto request = request_of(ranks, seq, mask);
      const AttentionPlan plan(request, context.rank());
      Shards shards(*request, context.rank(), static_cast<std::uint64_t>(each));
      shards.forward(*devices, plan);
      ExecutionReport report;
      ExecuteOptions joint, messages;
      joint.report = &report;
      messages.in_place = false;
      const std::vector<Tensor> expected = shards.backward(*devices, plan, messages);
      const std::vector<Tensor> found = shards.backward(*devices, plan, joint);
      if (devices->reach() == Communicator::Reach::everybody) {
        EXPECT_EQ(report.bytes_sent, 0);
        const AttentionSizes sizes{.head_dim = kDim, .value_dim = kDim};
        EXPECT_EQ(report.buffer_bytes,
                  backward_buffer_bytes(plan, sizes, {.in_place = true, .one_device = true}));
      }
      for (std::size_t i = 0; i < 3; ++i) {
        EXPECT_LE(largest_difference(found[i], expected[i]), 2e-4)
            << each << " rows a rank, result " << i << " of dQ, dK, dV";
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
