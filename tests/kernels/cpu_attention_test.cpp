#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "kernels/cpu/amx.hpp"
#include "kernels/cpu/bf16_dots.hpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/targets.h"
// clang-format on
#include "kernels/element.hpp"
#include "kernels/plain_attention.hpp"
#include "kernels/random_attention.hpp"

namespace annulus::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Target {
  std::int64_t vectors = 0;
  bool amx = false;
  bool dots = false;

  std::string name() const {
    return std::string(hwy::TargetName(vectors)) + (amx ? " and AMX" : dots ? " and dots" : "");
  }
};

// All that this processor runs, and the scalar fallback; the tile unit and the dot product of bf16
// add to AVX-512.
std::vector<Target> dispatch_targets() {
  hwy::SetSupportedTargetsForTest(0);
  std::vector<Target> targets{{HWY_STATIC_TARGET}};
  for (std::int64_t left = hwy::SupportedTargets() & HWY_TARGETS & ~HWY_STATIC_TARGET; left != 0;
       left &= left - 1) {
    targets.push_back({left & -left});
    if (targets.back().vectors == HWY_AVX3 && kernels::cpu::has_amx()) {
      targets.push_back({HWY_AVX3, true});
    }
    if (targets.back().vectors == HWY_AVX3 && kernels::cpu::has_bf16_dots()) {
      targets.push_back({HWY_AVX3, false, true});
    }
  }
  return targets;
}

// Runs the kernels on one dispatch target while it lives.
class OnTarget {
 public:
  explicit OnTarget(const Target& target) {
    hwy::SetSupportedTargetsForTest(target.vectors);
    hwy::GetChosenTarget().Update(target.vectors);
    kernels::cpu::allow_amx(target.amx);
    kernels::cpu::allow_bf16_dots(target.dots);
  }
  ~OnTarget() {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    kernels::cpu::allow_amx(true);
    kernels::cpu::allow_bf16_dots(true);
  }
  OnTarget(const OnTarget&) = delete;
  OnTarget& operator=(const OnTarget&) = delete;
};

double max_error(const std::vector<double>& x, const std::vector<double>& reference) {
  double worst = 0.0;
  for (std::size_t i = 0; i < reference.size(); ++i) {
    const double error = x[i] == reference[i] ? 0.0 : std::abs(x[i] - reference[i]);
    worst = std::isnan(error) ? kInfinity : std::max(worst, error);
  }
  return worst;
}

// 2·max|(ref + 0.3) − 0.3 − ref|, computed in the dtype, and roundings in f32, since with few
// elements plain attention may be right by luck: eight of the largest value or term, and four of
// the largest logit (its sum, its scaling, the maximum subtracted, the log-sum-exp), whose error is
// the relative error of its weight.
double absolute_tolerance(const std::vector<double>& reference, DType dtype, double largest,
                          double largest_logit) {
  double worst = 0.0;
  for (const double value : reference) {
    if (std::isinf(value)) continue;
    largest = std::max(largest, std::abs(value));
    const auto round = [&](float x) {
      if (dtype == DType::bf16) return bf16_to_float(float_to_bf16(x));
      return dtype == DType::f16 ? f16_to_float(float_to_f16(x)) : x;
    };
    const float there = round(round(static_cast<float>(value)) + 0.3F);
    worst = std::max(worst, std::abs(static_cast<double>(round(there - 0.3F)) - value));
  }
  return 2.0 * worst + (8.0 + 4.0 * largest_logit) * 0x1p-24 * largest;
}

// FlashAttention's rule: the error may be twice that of plain attention in the same dtype.
void expect_close(const char* what, const std::vector<double>& x,
                  const std::vector<double>& reference, const std::vector<double>& plain,
                  DType dtype, double factor, double largest_logit, double largest_term = 1.0) {
  const double error = max_error(x, reference);
  const double plain_error = max_error(plain, reference);
  const double tolerance =
      factor * plain_error + absolute_tolerance(reference, dtype, largest_term, largest_logit);
  EXPECT_LE(error, tolerance) << what << ": plain attention's error is " << plain_error;
}

struct Expected {
  std::vector<double> o, log_sum_exp, grad_q, grad_k, grad_v, grad_bias;
  HostTensor lse, delta;  // f32, for the backward
  PlainAttention plain;
};

Shape statistic_shape(const AttentionProblem& problem) {
  return Shape{problem.batch(), problem.q_heads(), problem.seq_q()};
}

HostTensor zeros(DType dtype, const Shape& shape) {
  const std::vector<int> order =
      shape.rank() == 3 ? std::vector<int>{0, 1, 2} : std::vector<int>{0, 1, 2, 3};
  HostTensor tensor(dtype, shape, order, 0);
  tensor.fill(std::vector<double>(static_cast<std::size_t>(shape.elements()), 0.0));
  return tensor;
}

Expected expect(const RandomAttention& random) {
  const AttentionProblem& problem = random.problem;
  Expected expected;
  HostTensor o = zeros(DType::f64, random.grad_o.view().shape);
  HostTensor lse = zeros(DType::f64, statistic_shape(problem));
  attention_forward({problem, {}, ForwardCall::Start::fresh, o.view(), lse.view(), {}},
                    "reference");
  HostTensor delta = zeros(DType::f64, statistic_shape(problem));
  attention_delta(std::as_const(o).view(), random.grad_o.view(), delta.view());
  expected.o = o.values();
  expected.log_sum_exp = lse.values();
  expected.lse = zeros(DType::f32, statistic_shape(problem));
  expected.lse.fill(expected.log_sum_exp);
  expected.delta = zeros(DType::f32, statistic_shape(problem));
  expected.delta.fill(delta.values());
  HostTensor grad_q = zeros(DType::f64, problem.q.shape);
  HostTensor grad_k = zeros(DType::f64, problem.k.shape);
  HostTensor grad_v = zeros(DType::f64, problem.v.shape);
  HostTensor grad_bias;
  if (problem.bias) grad_bias = zeros(DType::f64, problem.bias.shape);
  BackwardCall call{problem,
                    random.grad_o.view(),
                    std::as_const(lse).view(),
                    std::as_const(delta).view(),
                    grad_q.view(),
                    grad_k.view(),
                    grad_v.view(),
                    grad_bias.view(),
                    false,
                    {}};
  attention_backward(call, "reference");
  expected.grad_q = grad_q.values();
  expected.grad_k = grad_k.values();
  expected.grad_v = grad_v.values();
  if (problem.bias) expected.grad_bias = grad_bias.values();
  expected.plain = plain_attention(problem, random.grad_o.view(), expected.lse.values(),
                                   expected.delta.values());
  return expected;
}

// The same slices, keys before and after a cut: what two steps of a ring would see.
MaskSlices part_of(const MaskSlices& mask, std::int64_t seq_q, Span keys) {
  MaskSlices part;
  part.batch_offsets = mask.batch_offsets;
  for (const Slice& slice : mask.slices) part.slices.push_back(clip(slice, {0, seq_q}, keys));
  return part;
}

void forward_in_parts(const RandomAttention& random, std::uint64_t seed, TensorView o,
                      TensorView lse) {
  const AttentionProblem& problem = random.problem;
  std::mt19937_64 draw(seed);
  HostTensor accumulator(DType::f32, random.grad_o.view().shape, {0, 2, 1, 3}, 5);
  HostTensor max(DType::f32, statistic_shape(problem), {0, 1, 2}, 3);
  HostTensor sum(DType::f32, statistic_shape(problem), {0, 1, 2}, 0);
  const std::int64_t cut = std::uniform_int_distribution<std::int64_t>(0, problem.seq_kv())(draw);
  const std::vector<Span> parts{{0, cut}, {cut, problem.seq_kv()}};
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const MaskSlices slices = part_of(random.slices, problem.seq_q(), parts[i]);
    ForwardCall call{problem,
                     {accumulator.view(), max.view(), sum.view()},
                     i == 0 ? ForwardCall::Start::fresh : ForwardCall::Start::resume,
                     {},
                     {},
                     {}};
    call.problem.mask = slices.view();
    if (i + 1 == parts.size()) call.o = o, call.log_sum_exp = lse;
    attention_forward(call, "cpu");
  }
  EXPECT_TRUE(accumulator.margins_intact() && max.margins_intact() && sum.margins_intact());
}

void check_forward(const RandomAttention& random, const Expected& expected, bool in_parts) {
  const AttentionProblem& problem = random.problem;
  HostTensor o(problem.q.dtype, random.grad_o.view().shape, {0, 1, 2, 3}, 7);
  HostTensor lse(DType::f32, statistic_shape(problem), {0, 1, 2}, 3);
  if (in_parts) {
    forward_in_parts(random, 7, o.view(), lse.view());
  } else {
    attention_forward({problem, {}, ForwardCall::Start::fresh, o.view(), lse.view(), {}}, "cpu");
  }
  expect_close(in_parts ? "o in parts" : "o", o.values(), expected.o, expected.plain.o,
               problem.q.dtype, random.rule_factor, expected.plain.largest_logit);
  expect_close("log_sum_exp", lse.values(), expected.log_sum_exp, expected.plain.log_sum_exp,
               DType::f32, random.rule_factor, expected.plain.largest_logit);
  EXPECT_TRUE(o.margins_intact() && lse.margins_intact());
}

// Gradients are added to what is there: start from 1 everywhere.
HostTensor ones(const Shape& shape, const std::vector<int>& order) {
  HostTensor tensor(DType::f32, shape, order, 5);
  tensor.fill(std::vector<double>(static_cast<std::size_t>(shape.elements()), 1.0));
  return tensor;
}

std::vector<double> plus_one(std::vector<double> values) {
  for (double& value : values) value += 1.0;
  return values;
}

void check_backward(const RandomAttention& random, const Expected& expected) {
  const AttentionProblem& problem = random.problem;
  HostTensor grad_q = ones(problem.q.shape, {0, 2, 1, 3});
  HostTensor grad_k = ones(problem.k.shape, {0, 1, 2, 3});
  HostTensor grad_v = ones(problem.v.shape, {2, 0, 1, 3});
  HostTensor grad_bias;
  if (problem.bias) grad_bias = ones(problem.bias.shape, {0, 1, 2, 3});
  BackwardCall call{problem,
                    random.grad_o.view(),
                    expected.lse.view(),
                    expected.delta.view(),
                    grad_q.view(),
                    grad_k.view(),
                    grad_v.view(),
                    grad_bias.view(),
                    true,
                    {}};
  attention_backward(call, "cpu");
  const auto check = [&](const char* what, const HostTensor& x,
                         const std::vector<double>& reference, const std::vector<double>& plain) {
    expect_close(what, x.values(), plus_one(reference), plus_one(plain), problem.q.dtype,
                 random.rule_factor, expected.plain.largest_logit, expected.plain.largest_term);
    EXPECT_TRUE(x.margins_intact()) << what;
  };
  check("grad_q", grad_q, expected.grad_q, expected.plain.grad_q);
  check("grad_k", grad_k, expected.grad_k, expected.plain.grad_k);
  check("grad_v", grad_v, expected.grad_v, expected.plain.grad_v);
  if (problem.bias) {
    check("grad_bias", grad_bias, expected.grad_bias, expected.plain.grad_bias);
  }
}

// Queries see six keys up to their own; of 200 tokens the last twenty hold NaN. Queries before them
// and keys that no later query sees must not know.
struct MaskedNan {
  static constexpr std::int64_t kTokens = 200;
  static constexpr std::int64_t kFirst = 180;
  static constexpr std::int64_t kBack = 5;
  Shape shape{1, kTokens, 2, 32};
  Shape statistic{1, 2, kTokens};
  HostTensor q, k, v, grad_o, delta, dense;
  MaskSlices slices;
  AttentionProblem problem;

  MaskedNan(DType dtype, bool dense_mask, float soft_cap, bool nan) {
    std::mt19937_64 random(test_seed());
    for (HostTensor* tensor : {&q, &k, &v, &grad_o}) {
      *tensor = random_tensor(random, dtype, shape, 1.0);
    }
    delta = random_tensor(random, DType::f32, Shape{1, 1, 2, kTokens}, 1.0);
    AttentionMask mask;
    if (!dense_mask) mask.causal = true, mask.window_left = kBack;
    slices = make_slices(mask, 1, kTokens, kTokens);
    problem.q = std::as_const(q).view();
    problem.k = std::as_const(k).view();
    problem.v = std::as_const(v).view();
    problem.mask = slices.view();
    problem.scale = 0.2F;
    problem.soft_cap = soft_cap;
    if (dense_mask) use_dense_mask();
    if (nan) {
      for (HostTensor* tensor : {&k, &v, &q, &grad_o}) poison(*tensor);
    }
  }

  void use_dense_mask() {
    dense = HostTensor(DType::u8, Shape{1, 1, kTokens, kTokens}, {0, 1, 2, 3}, 0);
    std::vector<double> kept;
    for (std::int64_t i = 0; i < kTokens * kTokens; ++i) {
      const std::int64_t back = i / kTokens - i % kTokens;
      kept.push_back(back >= 0 && back <= kBack ? 1.0 : 0.0);
    }
    dense.fill(kept);
    problem.dense_mask = std::as_const(dense).view();
  }

  void poison(HostTensor& tensor) const {
    std::vector<double> values = tensor.values();
    std::fill(values.begin() + kFirst * 64, values.end(), std::nan(""));
    tensor.fill(values);
  }

  // o, dQ of the queries before the NaN, dK and dV of the keys that these alone see.
  std::vector<double> clean_part() const {
    HostTensor o = zeros(problem.q.dtype, shape);
    HostTensor lse = zeros(DType::f32, statistic);
    attention_forward({problem, {}, ForwardCall::Start::fresh, o.view(), lse.view(), {}}, "cpu");
    HostTensor delta_rows = zeros(DType::f32, statistic);
    delta_rows.fill(delta.values());
    std::vector<HostTensor> grads(3, zeros(DType::f32, shape));
    attention_backward({problem,
                        grad_o.view(),
                        std::as_const(lse).view(),
                        std::as_const(delta_rows).view(),
                        grads[0].view(),
                        grads[1].view(),
                        grads[2].view(),
                        {},
                        true,
                        {}},
                       "cpu");
    std::vector<double> all;
    const auto append = [&](const HostTensor& tensor, std::int64_t rows) {
      const std::vector<double> values = tensor.values();
      all.insert(all.end(), values.begin(), values.begin() + rows * 64);
    };
    append(o, kFirst);
    append(grads[0], kFirst);
    append(grads[1], kFirst - kBack);
    append(grads[2], kFirst - kBack);
    return all;
  }

  // Of each number of clean_part() the sum of its terms' sizes, and for o its own size twice: what
  // roundings of weights, and of results, may change by u of themselves.
  std::vector<double> sizes() const {
    const std::vector<double> qs = q.values(), ks = k.values(), vs = v.values();
    const std::vector<double> grads = grad_o.values(), deltas = delta.values();
    std::vector<double> o(qs.size()), grad_q(qs.size()), grad_k(qs.size()), grad_v(qs.size());
    for (std::int64_t row = 0; row < kFirst * 2; ++row) {
      const std::int64_t query = row / 2, head = row % 2;
      const std::int64_t first = std::max<std::int64_t>(0, query - kBack);
      const auto at = [&](std::int64_t token) {
        return static_cast<std::size_t>((token * 2 + head) * 32);
      };
      const auto dot = [&](const std::vector<double>& x, const std::vector<double>& y,
                           std::int64_t key) {
        return std::inner_product(&x[at(query)], &x[at(query)] + 32, &y[at(key)], 0.0);
      };
      std::vector<double> logits, slopes;
      for (std::int64_t key = first; key <= query; ++key) {
        const double raw = dot(qs, ks, key) * static_cast<double>(problem.scale);
        const double cap = static_cast<double>(problem.soft_cap);
        const double t = cap > 0.0 ? std::tanh(raw / cap) : 0.0;
        logits.push_back(cap > 0.0 ? cap * t : raw);
        slopes.push_back(1.0 - t * t);
      }
      double sum = 0.0;
      for (const double logit : logits) sum += std::exp(logit);
      for (std::int64_t key = first; key <= query; ++key) {
        const auto i = static_cast<std::size_t>(key - first);
        const double p = std::exp(logits[i]) / sum;
        const double ds = std::abs(
            p * (dot(grads, vs, key) - deltas[static_cast<std::size_t>(head * kTokens + query)]) *
            slopes[i] * static_cast<double>(problem.scale));
        for (std::size_t d = 0; d < 32; ++d) {
          o[at(query) + d] += 3.0 * p * std::abs(vs[at(key) + d]);
          grad_q[at(query) + d] += ds * std::abs(ks[at(key) + d]);
          grad_k[at(key) + d] += ds * std::abs(qs[at(query) + d]);
          grad_v[at(key) + d] += p * std::abs(grads[at(query) + d]);
        }
      }
    }
    std::vector<double> all(o.begin(), o.begin() + kFirst * 64);
    all.insert(all.end(), grad_q.begin(), grad_q.begin() + kFirst * 64);
    all.insert(all.end(), grad_k.begin(), grad_k.begin() + (kFirst - kBack) * 64);
    all.insert(all.end(), grad_v.begin(), grad_v.begin() + (kFirst - kBack) * 64);
    return all;
  }
};

TEST(CpuMaskedKeys, NanOfMaskedPairsReachesNothing) {
  for (const Target& target : dispatch_targets()) {
    const OnTarget on_target(target);
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const bool dense : {false, true}) {
        for (const float cap : {0.0F, 3.0F}) {
          const MaskedNan without(dtype, dense, cap, false);
          const std::vector<double> clean = without.clean_part(), sizes = without.sizes();
          const std::vector<double> beside = MaskedNan(dtype, dense, cap, true).clean_part();
          // Other orders of sums; in bf16 weights that only one of the two rounds, and results of
          // o.
          const double unit = dtype == DType::bf16 ? 0x1p-8 : 0.0;
          double worst = 0.0;  // of what is allowed
          for (std::size_t i = 0; i < clean.size(); ++i) {
            const double part = std::abs(beside[i] - clean[i]) / (1e-5 + unit * sizes[i]);
            worst = std::isnan(part) ? kInfinity : std::max(worst, part);
          }
          EXPECT_LE(worst, 1.0) << target.name() << " " << name(dtype) << " dense " << dense
                                << " cap " << cap;
        }
      }
    }
  }
}

constexpr std::uint64_t kShards = 16;
constexpr std::uint64_t kProblemsOfShard = 128;  // 2,048 in all

class CpuAttentionFuzz : public ::testing::TestWithParam<std::uint64_t> {};

TEST_P(CpuAttentionFuzz, EveryTargetMeetsTheAcceptanceRule) {
  for (std::uint64_t i = 0; i < kProblemsOfShard; ++i) {
    const RandomAttention random(test_seed() + GetParam() * kProblemsOfShard + i);
    const Expected expected = expect(random);
    for (const Target& target : dispatch_targets()) {
      SCOPED_TRACE(target.name() + ", " + random.description);
      const OnTarget on_target(target);
      check_forward(random, expected, false);
      check_forward(random, expected, true);
      check_backward(random, expected);
    }
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Shards, CpuAttentionFuzz, ::testing::Range(std::uint64_t{0}, kShards));

}  // namespace
}  // namespace annulus::testing
