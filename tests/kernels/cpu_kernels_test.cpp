#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/attention.hpp"
#include "kernels/cpu/amx.hpp"
#include "kernels/cpu/bf16_dots.hpp"
#include "kernels/random_attention.hpp"
#include "kernels/work_meter.hpp"

namespace annulus::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

HostTensor normal(std::mt19937_64& random, DType dtype, const Shape& shape) {
  return random_tensor(random, dtype, shape, 1.0);
}

HostTensor output(DType dtype, const Shape& shape) {
  return shape.rank() == 3 ? HostTensor(dtype, shape, {0, 1, 2}, 3)
                           : HostTensor(dtype, shape, {0, 1, 2, 3}, 5);
}

struct Case {
  HostTensor q, k, v;
  MaskSlices slices;
  AttentionProblem problem;

  Case(DType dtype, const Shape& rows, const Shape& keys, const AttentionMask& mask,
       std::uint64_t salt)
      : slices(make_slices(mask, rows[0], rows[1], keys[1])) {
    std::mt19937_64 random(test_seed() + salt);
    q = normal(random, dtype, rows);
    k = normal(random, dtype, keys);
    v = normal(random, dtype, keys);
    problem.q = std::as_const(q).view();
    problem.k = std::as_const(k).view();
    problem.v = std::as_const(v).view();
    problem.mask = slices.view();
    problem.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(rows[3])));
  }
  Shape statistic() const { return {problem.batch(), problem.q_heads(), problem.seq_q()}; }
};

struct Output {
  std::vector<double> o, log_sum_exp;
};

Output forward(const Case& c, std::string_view backend) {
  HostTensor o = output(DType::f32, c.problem.q.shape);
  HostTensor lse = output(DType::f32, c.statistic());
  attention_forward({c.problem, {}, ForwardCall::Start::fresh, o.view(), lse.view(), {}}, backend);
  return {o.values(), lse.values()};
}

double max_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = a[i] == b[i] ? 0.0 : std::abs(a[i] - b[i]);
    worst = std::isnan(difference) ? kInfinity : std::max(worst, difference);
  }
  return worst;
}

// Runs `work` with so many threads.
template <typename Work>
auto with_threads(int threads, const Work& work) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  auto result = work();
  omp_set_num_threads(before);
  return result;
}

AttentionMask causal() {
  AttentionMask mask;
  mask.causal = true;
  return mask;
}

// What the output may be off by where weights are rounded to bf16: 2^-9 of each term.
std::vector<double> rounding_of_weights(const Case& c) {
  Case magnitudes = c;
  std::vector<double> values = c.v.values();
  for (double& value : values) value = std::abs(value);
  magnitudes.v.fill(values);
  magnitudes.problem.v = std::as_const(magnitudes.v).view();
  std::vector<double> bounds = forward(magnitudes, "reference").o;
  for (double& bound : bounds) bound *= 0x1p-9;
  return bounds;
}

// Above 4,096 keys short queries are split into parts and merged.
TEST(CpuSplitKeys, MatchesTheReferenceForDecodeAndShortQueries) {
  for (const std::int64_t seq_q : {1, 2, 5, 16, 31}) {
    for (const std::int64_t seq_kv : {4095, 4097, 9001}) {
      const Case c(DType::bf16, Shape{2, seq_q, 8, 64}, Shape{2, seq_kv, 2, 64}, causal(),
                   static_cast<std::uint64_t>(seq_q));
      const Output reference = forward(c, "reference");
      const std::vector<double> rounding = rounding_of_weights(c);
      for (const bool products : {false, true}) {
        kernels::cpu::allow_amx(products);
        kernels::cpu::allow_bf16_dots(products);
        const Output ours = forward(c, "cpu");
        // Up to eight rows of a KV head keep weights in f32, or in two parts on the tile unit, but
        // for the values of whole tiles through the dot product.
        const bool by_heads = kernels::cpu::has_bf16_dots() &&
                              kernels::cpu::dot_decode() == kernels::cpu::DotDecode::heads;
        const bool rounds =
            by_heads ||
            ((kernels::cpu::has_amx() || kernels::cpu::has_bf16_dots()) && seq_q * 4 > 8);
        for (std::size_t i = 0; i < rounding.size(); ++i) {
          ASSERT_NEAR(ours.o[i], reference.o[i], 2e-6 + (rounds ? rounding[i] : 0.0))
              << seq_q << " " << seq_kv << " " << products;
        }
        // Sixteen roundings of a value near 9.
        EXPECT_LT(max_difference(ours.log_sum_exp, reference.log_sum_exp), 1e-5) << seq_q;
      }
      kernels::cpu::allow_amx(true);
      kernels::cpu::allow_bf16_dots(true);
    }
  }
}

TEST(CpuSplitKeys, ResumesACarriedStateAndFoldsSinksOnce) {
  Case c(DType::f32, Shape{1, 2, 4, 32}, Shape{1, 5000, 2, 32}, {}, 3);
  const std::vector<float> sinks{0.5F, -1.0F, 2.0F, 30.0F};
  c.problem.sinks = ConstTensorView(sinks.data(), DType::f32, Shape{4});
  const Output reference = forward(c, "reference");
  HostTensor o = output(DType::f32, c.problem.q.shape);
  HostTensor accumulator = output(DType::f32, c.problem.q.shape);
  HostTensor max = output(DType::f32, c.statistic());
  HostTensor sum = output(DType::f32, c.statistic());
  const AttentionState state{accumulator.view(), max.view(), sum.view()};
  const std::vector<Slice> first{{{0, 2}, {0, 4500}, {}}};
  const std::vector<Slice> second{{{0, 2}, {4500, 5000}, {}}};
  ForwardCall call{c.problem, state, ForwardCall::Start::fresh, {}, {}, {}};
  call.problem.mask = {first, {}};
  attention_forward(call, "cpu");
  call.problem.mask = {second, {}};
  call.start = ForwardCall::Start::resume;
  call.o = o.view();
  attention_forward(call, "cpu");
  EXPECT_LT(max_difference(o.values(), reference.o), 2e-6);
}

TEST(CpuSplitKeys, MatchTheReferenceUnderASoftCap) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool masked : {false, true}) {
      Case c(dtype, Shape{2, 2, 4, 64}, Shape{2, 300, 2, 64}, masked ? causal() : AttentionMask{},
             19);
      c.problem.soft_cap = 0.5F;
      const Output ours = forward(c, "cpu");
      const Output reference = forward(c, "reference");
      const double tolerance = dtype == DType::f32 ? 2e-6 : 1e-3;
      EXPECT_LE(max_difference(ours.o, reference.o), tolerance) << name(dtype) << " " << masked;
      EXPECT_LE(max_difference(ours.log_sum_exp, reference.log_sum_exp), 1e-5) << name(dtype);
    }
  }
}

// The last key is seen by the last query alone; its infinite value must not reach the other one.
TEST(CpuSplitKeys, KeepInfiniteValuesOfMaskedKeysOut) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Case c(dtype, Shape{1, 2, 2, 64}, Shape{1, 40, 2, 64}, causal(), 17);
    const Output clean = forward(c, "cpu");
    std::vector<double> values = c.v.values();
    std::fill(values.end() - 2 * 64, values.end(), kInfinity);
    c.v.fill(values);
    const Output found = forward(c, "cpu");
    for (std::size_t i = 0; i < found.o.size(); ++i) {
      if (i < found.o.size() / 2) {
        ASSERT_NEAR(found.o[i], clean.o[i], 1e-6) << name(dtype) << " " << i;
      } else {
        ASSERT_FALSE(std::isfinite(found.o[i])) << name(dtype) << " " << i;
      }
    }
  }
}

// Short queries go another way, which counts as well.
TEST(CpuWork, IsCountedInKeptPairs) {
  for (const auto& [seq_q, seq_kv] : {std::pair<std::int64_t, std::int64_t>{700, 700}, {2, 9000}}) {
    const Case c(DType::f32, Shape{2, seq_q, 6, 32}, Shape{2, seq_kv, 2, 32}, causal(), 5);
    const double expected = 2.0 * 6.0 * static_cast<double>(c.problem.mask.slices[0].area());
    const double before = work_meter().done();
    forward(c, "cpu");
    EXPECT_NEAR(work_meter().done() - before, expected, 1e-9 * work_meter().done());
  }
}

class CpuThreadsOn : public ::testing::TestWithParam<DType> {};

TEST_P(CpuThreadsOn, AnyNumberGivesTheSameBits) {
  std::mt19937_64 random(test_seed());
  for (const auto& [seq, keys] : {std::pair<std::int64_t, std::int64_t>{700, 700}, {3, 9000}}) {
    const Case c(GetParam(), Shape{1, seq, 6, 40}, Shape{1, keys, 2, 40}, causal(), 11);
    const HostTensor grad_o = normal(random, GetParam(), c.problem.q.shape);
    const auto run = [&] {
      Output out = forward(c, "cpu");
      HostTensor lse = output(DType::f32, c.statistic());
      lse.fill(out.log_sum_exp);
      HostTensor delta = output(DType::f32, c.statistic());
      delta.fill(std::vector<double>(out.log_sum_exp.size(), 0.25));
      std::vector<HostTensor> grads;
      for (const Shape& shape : {c.problem.q.shape, c.problem.k.shape, c.problem.v.shape}) {
        grads.push_back(output(DType::f32, shape));
        grads.back().fill(std::vector<double>(static_cast<std::size_t>(shape.elements()), 0.0));
      }
      attention_backward({c.problem,
                          grad_o.view(),
                          std::as_const(lse).view(),
                          std::as_const(delta).view(),
                          grads[0].view(),
                          grads[1].view(),
                          grads[2].view(),
                          {},
                          true,
                          {}},
                         "cpu");
      std::vector<double> all = out.o;
      for (const HostTensor& grad : grads) {
        const std::vector<double> values = grad.values();
        all.insert(all.end(), values.begin(), values.end());
      }
      return all;
    };
    const std::vector<double> one = with_threads(1, run);
    for (const int threads : {2, 3, 7}) {
      EXPECT_EQ(one, with_threads(threads, run)) << threads << " threads, " << seq << " queries";
    }
  }
}

// bf16 has a way of its own where there is a tile unit.
INSTANTIATE_TEST_SUITE_P(DTypes, CpuThreadsOn, ::testing::Values(DType::f32, DType::bf16));

// A shared bias gradient is written by all heads: they must take turns.
TEST(CpuThreads, ASharedBiasGradientHasTheSameBits) {
  Case c(DType::f32, Shape{2, 90, 6, 16}, Shape{2, 1300, 3, 16}, {}, 17);
  std::mt19937_64 random(test_seed() + 18);
  const HostTensor bias = normal(random, DType::f32, Shape{1, 1, 90, 1300});
  c.problem.bias = bias.view();
  const HostTensor grad_o = normal(random, DType::f32, c.problem.q.shape);
  HostTensor lse = output(DType::f32, c.statistic());
  lse.fill(forward(c, "cpu").log_sum_exp);
  HostTensor delta = output(DType::f32, c.statistic());
  delta.fill(std::vector<double>(lse.values().size(), 0.1));
  const auto run = [&] {
    HostTensor grad_bias = output(DType::f32, c.problem.bias.shape);
    grad_bias.fill(std::vector<double>(bias.values().size(), 0.0));
    attention_backward({c.problem,
                        grad_o.view(),
                        std::as_const(lse).view(),
                        std::as_const(delta).view(),
                        {},
                        {},
                        {},
                        grad_bias.view(),
                        true,
                        {}},
                       "cpu");
    return grad_bias.values();
  };
  EXPECT_EQ(with_threads(1, run), with_threads(5, run));
}

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

// A bias of −∞ leaves a row without weights, which infinite values do not change.
TEST(CpuAttention, RowsWithoutWeightsAreZero) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Case c(dtype, Shape{1, 40, 2, 32}, Shape{1, 40, 2, 32}, {}, 33);
    std::vector<double> values = c.v.values();
    std::fill_n(values.begin() + 3 * 64, 64, kInfinity);
    c.v.fill(values);
    HostTensor bias = output(DType::f32, Shape{1, 1, 40, 40});
    std::vector<double> biases(40 * 40, 0.0);
    std::fill_n(biases.begin() + 7 * 40, 40, -kInfinity);
    bias.fill(biases);
    c.problem.bias = std::as_const(bias).view();
    const Output found = forward(c, "cpu");
    for (std::size_t i = 0; i < found.o.size(); ++i) {
      const bool row_without = i / 64 == 7;
      ASSERT_EQ(found.o[i], row_without ? 0.0 : kInfinity) << name(dtype) << " " << i;
    }
    for (std::size_t i = 0; i < 80; ++i) ASSERT_EQ(std::isinf(found.log_sum_exp[i]), i % 40 == 7);
  }
}

TEST(CpuAttention, RefusesWhatItCannotServe) {
  const Case c(DType::f32, Shape{1, 3, 1, 20}, Shape{1, 3, 1, 20}, {}, 5);
  EXPECT_THROW(forward(c, "cpu"), std::exception);
  EXPECT_EQ(select_backend(c.problem, Direction::forward).name, "reference");
  const Case fits(DType::f16, Shape{1, 3, 1, 24}, Shape{1, 3, 1, 24}, {}, 6);
  EXPECT_EQ(select_backend(fits.problem, Direction::backward).name, "cpu");
}

}  // namespace
}  // namespace annulus::testing
