#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/cpu/amx.hpp"
#include "kernels/cpu/bf16_dots.hpp"
#include "kernels/cpu_case.hpp"
#include "kernels/work_meter.hpp"

namespace annulus::testing {
namespace {

// Runs `work` with so many threads.
template <typename Work>
auto with_threads(int threads, const Work& work) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  auto result = work();
  omp_set_num_threads(before);
  return result;
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
