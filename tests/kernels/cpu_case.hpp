#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/random_attention.hpp"

namespace annulus::testing {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Standard normal numbers.
inline HostTensor normal(std::mt19937_64& random, DType dtype, const Shape& shape) {
  return random_tensor(random, dtype, shape, 1.0);
}

/// Uninitialised, with padding behind its rows.
inline HostTensor output(DType dtype, const Shape& shape) {
  return shape.rank() == 3 ? HostTensor(dtype, shape, {0, 1, 2}, 3)
                           : HostTensor(dtype, shape, {0, 1, 2, 3}, 5);
}

/// One attention of the CPU kernels: queries [batch, seq_q, q_heads, dim], keys and values
/// [batch, seq_kv, kv_heads, dim].
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

/// A fresh call in f32 results.
inline Output forward(const Case& c, std::string_view backend) {
  HostTensor o = output(DType::f32, c.problem.q.shape);
  HostTensor lse = output(DType::f32, c.statistic());
  attention_forward({c.problem, {}, ForwardCall::Start::fresh, o.view(), lse.view(), {}}, backend);
  return {o.values(), lse.values()};
}

/// Infinite where a number is NaN on one side.
inline double max_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = a[i] == b[i] ? 0.0 : std::abs(a[i] - b[i]);
    worst = std::isnan(difference) ? kInfinity : std::max(worst, difference);
  }
  return worst;
}

inline AttentionMask causal() {
  AttentionMask mask;
  mask.causal = true;
  return mask;
}

}  // namespace annulus::testing
