#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/targets.h"
// clang-format on
#include "kernels/random_attention.hpp"

namespace annulus::testing {
namespace {

constexpr std::int64_t kTokens = 1900;
constexpr std::int64_t kWindow = 150;
constexpr std::int64_t kNanKey = 1200;

// GQA 2:1 under a window that leaves out 40 keys in the middle; the value of one key is NaN.
std::vector<double> windowed(DType dtype, std::string_view backend) {
  std::mt19937_64 random(test_seed());
  const HostTensor q = random_tensor(random, dtype, Shape{1, kTokens, 2, 32}, 1.0);
  const HostTensor k = random_tensor(random, dtype, Shape{1, kTokens, 1, 32}, 1.0);
  HostTensor v = random_tensor(random, dtype, Shape{1, kTokens, 1, 40}, 1.0);
  std::vector<double> values = v.values();
  values[kNanKey * 40] = std::nan("");
  v.fill(values);
  const Band band{-kWindow, 0};
  const std::vector<Slice> slices{{{0, kTokens}, {0, 700}, band},
                                  {{0, kTokens}, {740, kTokens}, band}};
  AttentionProblem problem;
  problem.q = q.view();
  problem.k = k.view();
  problem.v = std::as_const(v).view();
  problem.mask = {slices, {}};
  problem.scale = 0.2F;
  HostTensor o(DType::f32, Shape{1, kTokens, 2, 40}, {0, 1, 2, 3}, 5);
  attention_forward({problem, {}, ForwardCall::Start::fresh, o.view(), {}, {}}, backend);
  return o.values();
}

// More queries than meet keys in turn, none of which sees half of the keys: later ones reuse the
// memory of earlier ones.
TEST(CpuWindow, MatchesTheReferenceOnEveryTarget) {
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);  // all queries are one task
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const std::vector<double> expected = windowed(dtype, "reference");
    const double tolerance = dtype == DType::f32 ? 2e-6 : 0x1p-7;
    for (std::int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
      hwy::GetChosenTarget().Update(left & -left);
      const std::vector<double> ours = windowed(dtype, "cpu");
      for (std::size_t i = 0; i < ours.size(); ++i) {
        const auto query = static_cast<std::int64_t>(i / 80);
        const bool nan = i % 40 == 0 && query >= kNanKey && query <= kNanKey + kWindow;
        ASSERT_EQ(std::isnan(expected[i]), nan) << query;
        ASSERT_EQ(std::isnan(ours[i]), nan) << hwy::TargetName(left & -left) << " " << query;
        if (nan) continue;
        ASSERT_NEAR(ours[i], expected[i], tolerance) << hwy::TargetName(left & -left) << " " << i;
      }
    }
  }
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  omp_set_num_threads(threads);
}

}  // namespace
}  // namespace annulus::testing
