#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/cpu/amx.hpp"
#include "kernels/random_attention.hpp"

// On the tile unit f32 is computed as sums of parts in bf16. Infinite, NaN, huge and tiny values
// have no such parts: they go another way, and nobody else may notice.
namespace annulus::testing {
namespace {

// Two documents in one row of a batch, whose tokens share tiles; every fifth token of the second
// has an outlier among its elements.
struct Documents {
  static constexpr std::int64_t kFirst = 90;
  static constexpr std::int64_t kTokens = 200;
  static constexpr std::int64_t kDim = 40;
  Shape shape{1, kTokens, 2, kDim};
  HostTensor q, k, v, grad_o;
  MaskSlices slices;
  AttentionProblem problem;

  // `where` is q, k, v or o, the gradient of the output.
  Documents(DType dtype, char where, double outlier) {
    std::mt19937_64 random(test_seed());
    for (HostTensor* tensor : {&q, &k, &v, &grad_o}) {
      *tensor = random_tensor(random, dtype, shape, 1.0);
    }
    HostTensor& odd = where == 'q' ? q : where == 'k' ? k : where == 'v' ? v : grad_o;
    std::vector<double> values = odd.values();
    for (std::int64_t token = kFirst + 3; token < kTokens; token += 5) {
      values[static_cast<std::size_t>(token * 2 * kDim + token % (2 * kDim))] = outlier;
    }
    odd.fill(values);
    AttentionMask mask;
    mask.q_segments = mask.kv_segments = {{{{0, kFirst}, 0}, {{kFirst, kTokens}, 1}}};
    slices = make_slices(mask, 1, kTokens, kTokens);
    problem.q = std::as_const(q).view();
    problem.k = std::as_const(k).view();
    problem.v = std::as_const(v).view();
    problem.mask = slices.view();
    problem.scale = -0.2F;
  }

  // o, dQ, dK and dV.
  std::vector<std::vector<double>> attend(bool amx) const {
    kernels::cpu::allow_amx(amx);
    HostTensor o(DType::f32, shape, {0, 1, 2, 3}, 5);
    HostTensor lse(DType::f32, Shape{1, 2, kTokens}, {0, 1, 2}, 3);
    HostTensor delta(DType::f32, Shape{1, 2, kTokens}, {0, 1, 2}, 3);
    attention_forward({problem, {}, ForwardCall::Start::fresh, o.view(), lse.view(), {}}, "cpu");
    attention_delta(std::as_const(o).view(), std::as_const(grad_o).view(), delta.view());
    std::vector<HostTensor> grads(3, HostTensor(DType::f32, shape, {0, 1, 2, 3}, 5));
    for (HostTensor& grad : grads) {
      grad.fill(std::vector<double>(static_cast<std::size_t>(shape.elements()), 0.0));
    }
    attention_backward({problem,
                        std::as_const(grad_o).view(),
                        std::as_const(lse).view(),
                        std::as_const(delta).view(),
                        grads[0].view(),
                        grads[1].view(),
                        grads[2].view(),
                        {},
                        true,
                        {}},
                       "cpu");
    kernels::cpu::allow_amx(true);
    return {o.values(), grads[0].values(), grads[1].values(), grads[2].values()};
  }
};

std::vector<double> rows(const std::vector<double>& values, std::int64_t begin, std::int64_t end) {
  return {values.begin() + begin * 2 * Documents::kDim, values.begin() + end * 2 * Documents::kDim};
}

// Of two ways to the same values. What is infinite or NaN in one may be finite in the other, where
// terms of weight 0 do not count.
void expect_alike(const std::vector<double>& x, const std::vector<double>& y) {
  double largest = 1.0;
  for (const double value : y) {
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  }
  for (std::size_t i = 0; i < y.size(); ++i) {
    if (!std::isfinite(y[i])) continue;
    ASSERT_NEAR(x[i], y[i], 2e-6 * largest) << i;
  }
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(CpuSplit, RowsWithoutPartsAreComputedInF32) {
  for (const char where : {'q', 'k', 'v', 'o'}) {
    for (const double outlier : {1e-36, 1e-42, 1e30, -3e38, kInfinity, -kInfinity, std::nan("")}) {
      const Documents documents(DType::f32, where, outlier);
      const auto parts = documents.attend(true);
      const auto plain = documents.attend(false);
      const auto others = Documents(DType::f32, where, 0.5).attend(true);
      for (std::size_t i = 0; i < parts.size(); ++i) {
        SCOPED_TRACE(fmt::format("{} in {}, result {}", outlier, where, i));
        expect_alike(parts[i], plain[i]);
        EXPECT_EQ(rows(parts[i], 0, Documents::kFirst), rows(others[i], 0, Documents::kFirst));
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
