#include "kernels/scalar.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/philox.hpp"

namespace annulus {
namespace {

// Every 16-bit pattern survives the way to f32 and back; NaNs stay NaNs.
TEST(Scalar, EveryPatternOfHalfTheWidthSurvives) {
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float half = f16_to_float(bits);
    if (std::isnan(half)) {
      EXPECT_TRUE(std::isnan(f16_to_float(float_to_f16(half))));
    } else {
      EXPECT_EQ(float_to_f16(half), bits);
    }
    const float brain = bf16_to_float(bits);
    if (std::isnan(brain)) {
      EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(brain))));
    } else {
      EXPECT_EQ(float_to_bf16(brain), bits);
    }
  }
}

// No representable neighbour is nearer than the one chosen, and a tie goes to the even one.
TEST(Scalar, RoundsToNearestEven) {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> exponent(-26.0F, 16.5F);
  for (int i = 0; i < 200000; ++i) {
    const float value = std::exp2(exponent(random)) * ((i & 1) != 0 ? 1.0F : -1.0F);
    const std::uint16_t bits = float_to_f16(value);
    const auto error = [&](int step) {
      const float other = f16_to_float(static_cast<std::uint16_t>(bits + step));
      return std::abs(static_cast<double>(other) - static_cast<double>(value));
    };
    if (std::isinf(f16_to_float(bits))) {
      EXPECT_GE(std::abs(value), 65520.0F);
      continue;
    }
    EXPECT_LE(error(0), error(1)) << value;
    if ((bits & 0x7fffU) != 0) {
      EXPECT_LE(error(0), error(-1)) << value;
    }
  }
  EXPECT_EQ(float_to_f16(2049.0F), 0x6800);     // between 2048 and 2050
  EXPECT_EQ(float_to_f16(2051.0F), 0x6802);     // between 2050 and 2052
  EXPECT_EQ(float_to_f16(0x1p-25F), 0x0000);    // half of the least subnormal
  EXPECT_EQ(float_to_f16(0x1.8p-24F), 0x0002);  // 1.5 of it
  EXPECT_EQ(float_to_bf16(0x1.01p0F), 0x3f80);  // half a step above 1
  EXPECT_EQ(float_to_bf16(0x1.03p0F), 0x3f82);
}

// Known answers of Philox4x32-10 from the authors' Random123 distribution.
TEST(Philox, GivesTheKnownAnswers) {
  const auto zero = philox({0, 0, 0, 0}, 0);
  EXPECT_EQ(zero[0], 0x6627e8d5U);
  EXPECT_EQ(zero[1], 0xe169c58dU);
  EXPECT_EQ(zero[2], 0xbc57ac4cU);
  EXPECT_EQ(zero[3], 0x9b00dbd8U);
  const auto ones = philox({~0U, ~0U, ~0U, ~0U}, ~0ULL);
  EXPECT_EQ(ones[0], 0x408f276dU);
  EXPECT_EQ(ones[1], 0x41c83b0eU);
  EXPECT_EQ(ones[2], 0xa20bc7c6U);
  EXPECT_EQ(ones[3], 0x6d5451fdU);
}

TEST(Philox, DropsTheFractionAskedFor) {
  const std::uint32_t threshold = dropout_threshold(0.3F);
  int kept = 0;
  constexpr int kDraws = 100000;
  for (int k = 0; k < kDraws; ++k) kept += dropout_keeps(11, threshold, 1, 2, 3, k) ? 1 : 0;
  // Five standard deviations of a binomial.
  EXPECT_NEAR(kept, 0.7 * kDraws, 5.0 * std::sqrt(0.21 * kDraws));
}

}  // namespace
}  // namespace annulus
