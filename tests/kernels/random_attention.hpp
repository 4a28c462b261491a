#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.hpp"

namespace annulus::testing {

/// A strided host tensor whose gaps and margins hold poison (NaN, or 0xA5 bytes for u8).
class HostTensor {
 public:
  HostTensor() = default;
  /// Contiguous within dims of `order` (outermost first), with `gap` unused elements after each
  /// innermost row.
  HostTensor(DType dtype, const Shape& shape, const std::vector<int>& order, std::int64_t gap);

  TensorView view() { return view_at(0); }
  ConstTensorView view() const { return const_cast<HostTensor*>(this)->view_at(0); }
  bool absent() const { return bytes_.empty(); }
  /// Whether everything outside the view still holds poison.
  bool margins_intact() const;
  /// All elements in row-major order of the shape.
  std::vector<double> values() const;
  void fill(const std::vector<double>& values);

 private:
  TensorView view_at(std::int64_t offset);
  template <typename Visit>
  void for_each_offset(Visit visit) const;

  DType dtype_ = DType::f32;
  Shape shape_;
  Shape strides_;
  std::vector<std::uint8_t> bytes_;
};

/// A random problem with everything it points to, biased to awkward sizes.
struct RandomAttention {
  std::string description;
  HostTensor q, k, v, grad_o, sinks, bias, dense_mask;
  MaskSlices slices;
  std::vector<PositionRun> q_positions, k_positions;
  AttentionProblem problem;  // points into the members above
  double rule_factor = 2.0;  // of the acceptance rule: 3 with a soft cap

  explicit RandomAttention(std::uint64_t seed);
  RandomAttention(const RandomAttention&) = delete;
  RandomAttention& operator=(const RandomAttention&) = delete;
};

/// The seed of this run of the tests: ANNULUS_TEST_SEED, or a fresh one; printed once.
std::uint64_t test_seed();

/// A tensor of shape `shape` in a random order of batch, sequence and heads, with random values.
HostTensor random_tensor(std::mt19937_64& random, DType dtype, const Shape& shape, double spread);

}  // namespace annulus::testing
