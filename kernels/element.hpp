#pragma once

#include <cstdint>

#include "kernels/scalar.hpp"
#include "kernels/types.hpp"

namespace annulus {

/// Reads element `i` of floating data in double, whatever its dtype.
inline double load_element(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<double>(static_cast<const float*>(data)[i]);
    case DType::f64:
      return static_cast<const double*>(data)[i];
    case DType::f16:
      return static_cast<double>(f16_to_float(static_cast<const std::uint16_t*>(data)[i]));
    case DType::bf16:
      return static_cast<double>(bf16_to_float(static_cast<const std::uint16_t*>(data)[i]));
    case DType::u8:
      return static_cast<double>(static_cast<const std::uint8_t*>(data)[i]);
    case DType::i32:
      return static_cast<double>(static_cast<const std::int32_t*>(data)[i]);
    case DType::i64:
      return static_cast<double>(static_cast<const std::int64_t*>(data)[i]);
  }
  return 0.0;
}

/// Writes element `i`, rounded to the dtype (f64 to f16 and bf16 by way of f32).
inline void store_element(void* data, DType dtype, std::int64_t i, double value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case DType::f64:
      static_cast<double*>(data)[i] = value;
      break;
    case DType::f16:
      static_cast<std::uint16_t*>(data)[i] = float_to_f16(static_cast<float>(value));
      break;
    case DType::bf16:
      static_cast<std::uint16_t*>(data)[i] = float_to_bf16(static_cast<float>(value));
      break;
    case DType::u8:
      static_cast<std::uint8_t*>(data)[i] = static_cast<std::uint8_t>(value);
      break;
    case DType::i32:
      static_cast<std::int32_t*>(data)[i] = static_cast<std::int32_t>(value);
      break;
    case DType::i64:
      static_cast<std::int64_t*>(data)[i] = static_cast<std::int64_t>(value);
      break;
  }
}

}  // namespace annulus
