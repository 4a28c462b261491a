#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/attention.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kKeys = 4096;
constexpr std::int64_t kHeadDim = 32;

struct Result {
  std::vector<float> o;
  std::vector<float> log_sum_exp;
};

// The same query in every row.
Result attend(std::int64_t rows, const std::vector<float>& k, const std::vector<float>& v,
              const char* backend) {
  const std::vector<Slice> slices = {{{0, rows}, {0, kKeys}, Band{}}};
  std::vector<float> q(static_cast<std::size_t>(rows * kHeadDim), 0.0F);
  for (std::int64_t row = 0; row < rows; ++row) q[static_cast<std::size_t>(row * kHeadDim)] = 1.0F;
  Result result;
  result.o.resize(q.size());
  result.log_sum_exp.resize(static_cast<std::size_t>(rows));
  ForwardCall call;
  call.problem.q = {q.data(), DType::f32, Shape{1, rows, 1, kHeadDim}};
  call.problem.k = {k.data(), DType::f32, Shape{1, kKeys, 1, kHeadDim}};
  call.problem.v = {v.data(), DType::f32, Shape{1, kKeys, 1, kHeadDim}};
  call.problem.mask = {slices, {}};
  call.o = {result.o.data(), DType::f32, Shape{1, rows, 1, kHeadDim}};
  call.log_sum_exp = {result.log_sum_exp.data(), DType::f32, Shape{1, 1, rows}};
  attention_forward(call, backend);
  return result;
}

// A ring computes a row's own block first, which often holds its largest logit. Each of the other
// keys weighs 3e-9 of it, less than half a unit in the last place of the sums, all together 1.2e-5.
TEST(SmallTerms, AddUpBesideALargeOneThatCameFirst) {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> around_one(0.5F, 1.5F);
  std::vector<float> k(kKeys * kHeadDim, 0.0F);
  std::vector<float> v(kKeys * kHeadDim);
  for (std::int64_t key = 0; key < kKeys; ++key) {
    k[static_cast<std::size_t>(key * kHeadDim)] = key == 0 ? 0.0F : std::log(3e-9F);
  }
  for (float& x : v) x = around_one(random);
  // One rounding of the running sum, and of outputs up to 1.5, for each 64 keys.
  constexpr double kTolerance = 1.5 * kKeys / 64 * 0x1p-24;
  for (const std::int64_t rows : {1, 100}) {  // short queries have a loop of their own
    const Result expected = attend(rows, k, v, "reference");
    const Result found = attend(rows, k, v, "cpu");
    EXPECT_NEAR(found.log_sum_exp.back(), expected.log_sum_exp.back(), kTolerance) << rows;
    for (std::size_t i = 0; i < found.o.size(); ++i) {
      ASSERT_NEAR(found.o[i], expected.o[i], kTolerance) << i << " of " << rows << " rows";
    }
  }
}

}  // namespace
}  // namespace annulus
