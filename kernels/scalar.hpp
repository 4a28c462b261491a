#pragma once

#include <bit>
#include <cstdint>

namespace annulus {

/// bf16 is the upper half of an f32.
inline float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// Selections rather than branches, here and below: loops over them become vectors.

/// Rounds to nearest even; a NaN stays a (quiet) NaN.
inline std::uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t quiet = (bits >> 16) | 0x40U;
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? quiet : rounded);
}

/// IEEE 754 binary16; subnormals are scaled by a float multiplication, which is exact.
inline float f16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  const std::uint32_t mantissa = bits & 0x3ffU;
  const float scaled = static_cast<float>(static_cast<std::int32_t>(mantissa)) * 0x1p-24F;
  const std::uint32_t wide = exponent == 31 ? 255U : exponent + 112U;
  const std::uint32_t normal = (wide << 23) | (mantissa << 13);
  const std::uint32_t magnitude = exponent == 0 ? std::bit_cast<std::uint32_t>(scaled) : normal;
  return std::bit_cast<float>(sign | magnitude);
}

/// Rounds to nearest even; beyond 65519 it is infinite.
inline std::uint16_t float_to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  // Adding 0.5 leaves the 10 bits that a subnormal keeps in the low mantissa, rounded by the FPU.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000U;
  const std::uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  const std::uint32_t normal = (rounded - 0x38000000U) >> 13;
  const std::uint32_t finite = magnitude < 0x38800000U ? subnormal : normal;
  const std::uint32_t small = magnitude >= 0x477ff000U ? 0x7c00U : finite;
  return static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000U ? 0x7e00U : small));
}

/// The larger value; a NaN on either side wins, so that it reaches the output.
inline double max_or_nan(double a, double b) { return a > b || a != a ? a : b; }

}  // namespace annulus
