#include "kernels/attention_reference.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/error.hpp"

namespace annulus {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A problem in double with every option, and its gradients.
struct Case {
  std::vector<double> q, k, v, bias, sinks, grad_o;
  std::vector<std::uint8_t> dense;
  MaskSlices slices;
  AttentionProblem problem;

  explicit Case(std::uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<double>& values, std::size_t count) {
      values.resize(count);
      for (double& value : values) value = normal(random);
    };
    fill(q, 2 * 5 * 4 * 3);
    fill(k, 2 * 6 * 2 * 3);
    fill(v, 2 * 6 * 2 * 2);
    fill(bias, 1 * 4 * 5 * 6);
    fill(sinks, 4);
    fill(grad_o, 2 * 5 * 4 * 2);
    dense.resize(2 * 5 * 6);
    for (auto& flag : dense) flag = random() % 4 != 0 ? 1 : 0;
    AttentionMask mask;
    mask.causal = true;
    slices = make_slices(mask, 2, 5, 6);
    problem.q = {q.data(), DType::f64, Shape{2, 5, 4, 3}};
    problem.k = {k.data(), DType::f64, Shape{2, 6, 2, 3}};
    problem.v = {v.data(), DType::f64, Shape{2, 6, 2, 2}};
    problem.bias = {bias.data(), DType::f64, Shape{1, 4, 5, 6}};
    problem.sinks = {sinks.data(), DType::f64, Shape{4}};
    problem.dense_mask = {dense.data(), DType::u8, Shape{2, 1, 5, 6}};
    problem.mask = slices.view();
    problem.scale = 0.5F;
    problem.soft_cap = 2.0F;
    problem.dropout = {0.25F, 99, 3, 8, {}, {}};
  }
};

struct Output {
  std::vector<double> o = std::vector<double>(2 * 5 * 4 * 2, NAN);
  std::vector<double> lse = std::vector<double>(2 * 4 * 5, NAN);
};

Output run(const AttentionProblem& problem) {
  Output output;
  ForwardCall call;
  call.problem = problem;
  call.o = {output.o.data(), DType::f64, Shape{2, 5, 4, 2}};
  call.log_sum_exp = {output.lse.data(), DType::f64, Shape{2, 4, 5}};
  attention_forward(call, "reference");
  return output;
}

double loss(const Case& c) {
  const Output output = run(c.problem);
  double sum = 0.0;
  for (std::size_t i = 0; i < output.o.size(); ++i) sum += output.o[i] * c.grad_o[i];
  return sum;
}

// Central differences of Σ O·dO against one analytic gradient.
void expect_gradient(Case& c, std::vector<double>& values, const std::vector<double>& gradient,
                     const char* what) {
  constexpr double kStep = 1e-5;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double kept = values[i];
    values[i] = kept + kStep;
    const double above = loss(c);
    values[i] = kept - kStep;
    const double below = loss(c);
    values[i] = kept;
    EXPECT_NEAR((above - below) / (2.0 * kStep), gradient[i], 1e-8) << what << " " << i;
  }
}

TEST(AttentionReference, GradientsMatchFiniteDifferences) {
  Case c(5);
  const Output output = run(c.problem);
  std::vector<double> delta(2 * 4 * 5);
  const Shape o_shape{2, 5, 4, 2};
  const TensorView delta_view(delta.data(), DType::f64, Shape{2, 4, 5});
  const ConstTensorView lse(output.lse.data(), DType::f64, Shape{2, 4, 5});
  const ConstTensorView grad_o(c.grad_o.data(), DType::f64, o_shape);
  attention_delta(ConstTensorView(output.o.data(), DType::f64, o_shape), grad_o, delta_view);
  std::vector<double> dq(c.q.size()), dk(c.k.size()), dv(c.v.size()), dbias(c.bias.size()),
      dsinks(c.sinks.size());
  BackwardCall call;
  call.problem = c.problem;
  call.grad_o = grad_o;
  call.log_sum_exp = lse;
  call.delta = delta_view;
  call.grad_q = {dq.data(), DType::f64, c.problem.q.shape};
  call.grad_k = {dk.data(), DType::f64, c.problem.k.shape};
  call.grad_v = {dv.data(), DType::f64, c.problem.v.shape};
  call.grad_bias = {dbias.data(), DType::f64, c.problem.bias.shape};
  attention_backward(call, "reference");
  attention_sink_gradient(c.problem.sinks, lse, delta_view, {dsinks.data(), DType::f64, Shape{4}});
  expect_gradient(c, c.q, dq, "query");
  expect_gradient(c, c.k, dk, "key");
  expect_gradient(c, c.v, dv, "value");
  expect_gradient(c, c.bias, dbias, "bias");
  expect_gradient(c, c.sinks, dsinks, "sink");
}

// Splitting the keys over calls, by resuming or by merging, changes nothing.
TEST(AttentionReference, CarriedAndMergedStatesEqualOneCall) {
  Case c(6);
  const Output whole = run(c.problem);
  std::vector<Slice> low, high;
  for (const Slice& slice : c.slices.slices) {
    low.push_back(clip(slice, slice.q, {0, 2}));
    high.push_back(clip(slice, slice.q, {2, 6}));
  }
  struct StateData {
    std::vector<double> o = std::vector<double>(2 * 5 * 4 * 2, NAN);
    std::vector<double> max = std::vector<double>(40, NAN), sum = std::vector<double>(40, NAN);
    AttentionState view() {
      return {{o.data(), DType::f64, Shape{2, 5, 4, 2}},
              {max.data(), DType::f64, Shape{2, 4, 5}},
              {sum.data(), DType::f64, Shape{2, 4, 5}}};
    }
  } carried, other;
  ForwardCall call;
  call.problem = c.problem;
  call.problem.mask = {high, {}};
  call.state = carried.view();
  attention_forward(call, "reference");
  ForwardCall second = call;
  second.problem.mask = {low, {}};
  second.problem.sinks = {};
  second.state = other.view();
  attention_forward(second, "reference");

  Output resumed;
  ForwardCall last = call;
  last.problem.mask = {low, {}};
  last.start = ForwardCall::Start::resume;
  last.o = {resumed.o.data(), DType::f64, Shape{2, 5, 4, 2}};
  last.log_sum_exp = {resumed.lse.data(), DType::f64, Shape{2, 4, 5}};
  attention_forward(last, "reference");
  Output merged;
  merge(other.view(), carried.view());
  finish(carried.view(), {merged.o.data(), DType::f64, Shape{2, 5, 4, 2}},
         {merged.lse.data(), DType::f64, Shape{2, 4, 5}});
  for (std::size_t i = 0; i < whole.o.size(); ++i) {
    EXPECT_NEAR(resumed.o[i], whole.o[i], 1e-13);
    EXPECT_NEAR(merged.o[i], whole.o[i], 1e-13);
  }
  for (std::size_t i = 0; i < whole.lse.size(); ++i) {
    EXPECT_NEAR(resumed.lse[i], whole.lse[i], 1e-13);
    EXPECT_NEAR(merged.lse[i], whole.lse[i], 1e-13);
  }
}

TEST(AttentionReference, EmptyRowsAreZeroAndNaNsSpread) {
  Case c(7);
  c.problem.sinks = {};
  c.problem.mask = {};
  const Output empty = run(c.problem);
  for (const double value : empty.o) EXPECT_EQ(value, 0.0);
  for (const double value : empty.lse) EXPECT_EQ(value, -kInfinity);

  Case nan(8);
  nan.problem.dense_mask = {};
  nan.k[0] = NAN;  // batch 0, key 0, KV head 0: query heads 0 and 1 of every row see it
  const Output spread = run(nan.problem);
  EXPECT_TRUE(std::isnan(spread.o[0]));
  EXPECT_TRUE(std::isnan(spread.lse[0]));
  EXPECT_FALSE(std::isnan(spread.o[2 * 2]));
  EXPECT_FALSE(std::isnan(spread.o[5 * 4 * 2]));
}

TEST(AttentionProblem, RefusalsSayWhatWasFound) {
  const auto message_of = [](const AttentionProblem& problem) {
    try {
      validate(problem);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  Case c(9);
  EXPECT_EQ(message_of(c.problem), "accepted");
  AttentionProblem heads = c.problem;
  heads.q = {c.q.data(), DType::f64, Shape{2, 5, 3, 3}};
  EXPECT_NE(message_of(heads).find("3 query heads do not group over 2 KV heads"),
            std::string::npos);
  AttentionProblem batch = c.problem;
  batch.k = {c.k.data(), DType::f64, Shape{1, 6, 2, 3}};
  EXPECT_NE(message_of(batch).find("batch 2 of query, 1 of key"), std::string::npos);
  AttentionProblem dtype = c.problem;
  dtype.v.dtype = DType::f32;
  EXPECT_NE(message_of(dtype).find("dtypes"), std::string::npos);
}

}  // namespace
}  // namespace annulus
