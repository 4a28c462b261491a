#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/cpu_case.hpp"

namespace annulus::testing {
namespace {

// Σ grad_o·o in double, by the reference, as a function of one input element.
double objective(const AttentionProblem& problem, const std::vector<double>& grad_o) {
  HostTensor o(DType::f64,
               Shape{problem.batch(), problem.seq_q(), problem.q_heads(), problem.value_dim()},
               {0, 1, 2, 3}, 0);
  attention_forward({problem, {}, ForwardCall::Start::fresh, o.view(), {}, {}}, "reference");
  double sum = 0.0;
  const std::vector<double> values = o.values();
  for (std::size_t i = 0; i < values.size(); ++i) sum += values[i] * grad_o[i];
  return sum;
}

// Central difference of the objective for one element of a tensor of doubles.
double difference(const AttentionProblem& problem, const std::vector<double>& grad_o,
                  HostTensor& tensor, std::size_t element) {
  constexpr double kStep = 1e-5;
  const std::vector<double> values = tensor.values();
  std::vector<double> moved = values;
  moved[element] = values[element] + kStep;
  tensor.fill(moved);
  const double above = objective(problem, grad_o);
  moved[element] = values[element] - kStep;
  tensor.fill(moved);
  const double below = objective(problem, grad_o);
  tensor.fill(values);
  return (above - below) / (2.0 * kStep);
}

HostTensor in_double(const HostTensor& tensor) {
  HostTensor copy(DType::f64, tensor.view().shape, {0, 1, 2, 3}, 0);
  copy.fill(tensor.values());
  return copy;
}

// Gradients of keys that hold NaN before, inside padding: as if they had been cleared.
TEST(CpuGradients, OverwriteThoseOfKeysWhereAsked) {
  const Case c(DType::f32, Shape{2, 7, 4, 16}, Shape{2, 9, 2, 16}, causal(), 27);
  std::mt19937_64 random(test_seed() + 28);
  const HostTensor grad_o = normal(random, DType::f32, c.problem.q.shape);
  HostTensor o = output(DType::f32, c.problem.q.shape);
  HostTensor lse = output(DType::f32, c.statistic());
  HostTensor delta = output(DType::f32, c.statistic());
  attention_forward({c.problem, {}, ForwardCall::Start::fresh, o.view(), lse.view(), {}}, "cpu");
  attention_delta(std::as_const(o).view(), grad_o.view(), delta.view());
  for (const char* backend : {"cpu", "reference"}) {
    std::vector<std::vector<double>> results;
    for (const bool overwrites : {false, true}) {
      HostTensor k = output(DType::f32, c.problem.k.shape);
      HostTensor v = output(DType::f32, c.problem.v.shape);
      const auto elements = static_cast<std::size_t>(c.problem.k.shape.elements());
      const std::vector<double> before(elements, overwrites ? NAN : 0.0);
      k.fill(before);
      v.fill(before);
      BackwardCall call;
      call.problem = c.problem;
      call.grad_o = grad_o.view();
      call.log_sum_exp = std::as_const(lse).view();
      call.delta = std::as_const(delta).view();
      call.grad_k = k.view();
      call.grad_v = v.view();
      call.overwrites_kv = overwrites;
      attention_backward(call, backend);
      results.push_back(k.values());
      results.push_back(v.values());
    }
    EXPECT_EQ(results[2], results[0]) << backend;
    EXPECT_EQ(results[3], results[1]) << backend;
  }
}

// A bias of −∞ for all keys of a row, of which no mask tells: the row counts nothing.
TEST(CpuGradients, OfRowsWithoutWeightsAreZero) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Case c(dtype, Shape{1, 40, 2, 32}, Shape{1, 40, 2, 32}, {}, 29);
    std::mt19937_64 random(test_seed() + 30);
    const HostTensor grad_o = normal(random, dtype, c.problem.q.shape);
    HostTensor bias = output(DType::f32, Shape{1, 1, 40, 40});
    std::vector<double> values(40 * 40, 0.0);
    std::fill_n(values.begin() + 7 * 40, 40, -kInfinity);
    bias.fill(values);
    c.problem.bias = std::as_const(bias).view();
    HostTensor lse = output(DType::f32, c.statistic());
    lse.fill(forward(c, "cpu").log_sum_exp);
    HostTensor delta = output(DType::f32, c.statistic());
    delta.fill(std::vector<double>(2 * 40, 0.0));
    std::vector<std::vector<double>> results;
    for (const char* backend : {"cpu", "reference"}) {
      std::vector<HostTensor> grads(3, output(DType::f32, c.problem.q.shape));
      for (HostTensor& grad : grads) grad.fill(std::vector<double>(40 * 64, 0.0));
      BackwardCall call;
      call.problem = c.problem;
      call.grad_o = grad_o.view();
      call.log_sum_exp = std::as_const(lse).view();
      call.delta = std::as_const(delta).view();
      call.grad_q = grads[0].view();
      call.grad_k = grads[1].view();
      call.grad_v = grads[2].view();
      attention_backward(call, backend);
      for (const HostTensor& grad : grads) results.push_back(grad.values());
    }
    const double tolerance = dtype == DType::f32 ? 1e-5 : 0x1p-5;
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_LE(max_difference(results[i], results[3 + i]), tolerance) << name(dtype) << " " << i;
    }
    for (std::size_t i = 7 * 64; i < 8 * 64; ++i) ASSERT_EQ(results[0][i], 0.0) << name(dtype);
  }
}

// A head with a sink of −∞, and rows of it without keys.
TEST(CpuGradients, OfNoSinkAreZero) {
  const std::vector<float> sinks{-std::numeric_limits<float>::infinity(), 1.0F};
  HostTensor lse = output(DType::f32, Shape{2, 2, 2});
  lse.fill({-kInfinity, 0.5, 1.0, 1.5, 2.0, -kInfinity, 1.0, 3.0});
  HostTensor delta = output(DType::f32, Shape{2, 2, 2});
  delta.fill({0.0, 0.25, 0.5, 0.0, 0.25, 0.0, 2.0, 0.0});
  std::vector<float> grads(2, 0.0F);
  attention_sink_gradient(ConstTensorView(sinks.data(), DType::f32, Shape{2}),
                          std::as_const(lse).view(), std::as_const(delta).view(),
                          TensorView(grads.data(), DType::f32, Shape{2}));
  EXPECT_EQ(grads, (std::vector<float>{0.0F, -2.5F}));
}

std::vector<std::vector<double>> gradients(const Case& c, const HostTensor& grad_o,
                                           std::string_view backend) {
  HostTensor o = output(DType::f64, c.problem.q.shape);
  HostTensor lse = output(DType::f64, c.statistic());
  HostTensor delta = output(DType::f64, c.statistic());
  attention_forward({c.problem, {}, ForwardCall::Start::fresh, o.view(), lse.view(), {}},
                    "reference");
  attention_delta(std::as_const(o).view(), grad_o.view(), delta.view());
  HostTensor single_lse = output(DType::f32, c.statistic());
  HostTensor single_delta = output(DType::f32, c.statistic());
  single_lse.fill(lse.values());
  single_delta.fill(delta.values());
  std::vector<HostTensor> grads;
  for (const Shape& shape : {c.problem.q.shape, c.problem.k.shape, c.problem.v.shape}) {
    grads.push_back(output(DType::f32, shape));
    grads.back().fill(std::vector<double>(static_cast<std::size_t>(shape.elements()), 0.0));
  }
  BackwardCall call;
  call.problem = c.problem;
  call.grad_o = grad_o.view();
  call.log_sum_exp = std::as_const(single_lse).view();
  call.delta = std::as_const(single_delta).view();
  call.grad_q = grads[0].view();
  call.grad_k = grads[1].view();
  call.grad_v = grads[2].view();
  attention_backward(call, backend);
  return {grads[0].values(), grads[1].values(), grads[2].values()};
}

// Keys pass in chunks of 256 or 512; the last queries see all, the first not the last chunk.
TEST(CpuGradients, MatchTheReferenceOverChunksOfKeys) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t dim : {64, 136}) {
      AttentionMask mask = causal();
      mask.window_left = 1200;
      const Case c(dtype, Shape{1, 330, 2, dim}, Shape{1, 1300, 1, dim}, mask, 31);
      std::mt19937_64 random(test_seed() + 32);
      const HostTensor grad_o = normal(random, dtype, c.problem.q.shape);
      const auto ours = gradients(c, grad_o, "cpu");
      const auto reference = gradients(c, grad_o, "reference");
      const double tolerance = dtype == DType::f32 ? 1e-5 : 3e-3;
      for (std::size_t i = 0; i < 3; ++i) {
        EXPECT_LE(max_difference(ours[i], reference[i]), tolerance)
            << name(dtype) << " dim " << dim << " gradient " << i;
      }
    }
  }
}

// The gradients of everything at once, against differences in double of the reference.
TEST(CpuGradients, MatchFiniteDifferences) {
  Case c(DType::f32, Shape{1, 7, 4, 16}, Shape{1, 9, 2, 16}, causal(), 23);
  std::mt19937_64 random(test_seed() + 24);
  const HostTensor bias = normal(random, DType::f32, Shape{1, 1, 7, 9});
  const HostTensor grad_o = normal(random, DType::f32, c.problem.q.shape);
  const std::vector<float> sinks{0.5F, -1.0F, 2.0F, 0.0F};
  c.problem.bias = bias.view();
  c.problem.soft_cap = 3.0F;
  c.problem.sinks = ConstTensorView(sinks.data(), DType::f32, Shape{4});
  c.problem.dropout = {0.25F, 99, 1, 2, {}, {}};

  HostTensor o = output(DType::f32, c.problem.q.shape);
  HostTensor lse = output(DType::f32, c.statistic());
  HostTensor delta = output(DType::f32, c.statistic());
  attention_forward({c.problem, {}, ForwardCall::Start::fresh, o.view(), lse.view(), {}}, "cpu");
  attention_delta(std::as_const(o).view(), grad_o.view(), delta.view());
  std::vector<HostTensor> grads;
  for (const ConstTensorView& view : {c.problem.q, c.problem.k, c.problem.v, c.problem.bias}) {
    grads.push_back(output(DType::f32, view.shape));
    grads.back().fill(std::vector<double>(static_cast<std::size_t>(view.shape.elements()), 0.0));
  }
  attention_backward({c.problem,
                      grad_o.view(),
                      std::as_const(lse).view(),
                      std::as_const(delta).view(),
                      grads[0].view(),
                      grads[1].view(),
                      grads[2].view(),
                      grads[3].view(),
                      true,
                      {}},
                     "cpu");

  std::vector<HostTensor> inputs;
  for (const HostTensor* tensor :
       {&std::as_const(c.q), &std::as_const(c.k), &std::as_const(c.v), &bias}) {
    inputs.push_back(in_double(*tensor));
  }
  AttentionProblem exact = c.problem;
  exact.q = std::as_const(inputs[0]).view();
  exact.k = std::as_const(inputs[1]).view();
  exact.v = std::as_const(inputs[2]).view();
  exact.bias = std::as_const(inputs[3]).view();
  const std::vector<double> grad_values = grad_o.values();
  for (std::size_t t = 0; t < inputs.size(); ++t) {
    const std::vector<double> ours = grads[t].values();
    for (std::size_t i = 0; i < ours.size(); i += 5) {
      EXPECT_NEAR(ours[i], difference(exact, grad_values, inputs[t], i), 1e-5)
          << "tensor " << t << " element " << i;
    }
  }

  std::vector<float> grad_sinks(4, 0.0F);
  attention_sink_gradient(c.problem.sinks, std::as_const(lse).view(), std::as_const(delta).view(),
                          TensorView(grad_sinks.data(), DType::f32, Shape{4}));
  std::vector<float> moved = sinks;
  exact.sinks = ConstTensorView(moved.data(), DType::f32, Shape{4});
  for (std::size_t h = 0; h < 4; ++h) {
    constexpr float kStep = 0x1p-10F;  // sinks are f32: a step that is exact there
    moved[h] = sinks[h] + kStep;
    const double above = objective(exact, grad_values);
    moved[h] = sinks[h] - kStep;
    const double below = objective(exact, grad_values);
    moved[h] = sinks[h];
    EXPECT_NEAR(static_cast<double>(grad_sinks[h]), (above - below) / (2.0 * 0x1p-10), 2e-5) << h;
  }
}

}  // namespace
}  // namespace annulus::testing
