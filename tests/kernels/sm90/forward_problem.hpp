#pragma once

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "device_tensor.hpp"
#include "kernels/attention.hpp"
#include "kernels/cuda_support.hpp"
#include "random_slices.hpp"

/// Problems for the tests of the Hopper forward kernel.
namespace annulus {

struct ForwardCase {
  std::int64_t batch, seq_q, seq_kv, q_heads, kv_heads, head_dim, value_dim;
  DType dtype;
  float soft_cap = 0.0F;
  bool sinks = false;
  int segments = 1;
  bool ring = false;        // one call a segment, with carried state
  bool chained = false;     // the calls of a ring may overlap
  bool wide_output = true;  // fp32, or the type of the inputs
  float sharpness = 1.0F;   // of the scale; at 300, the scores of later blocks outgrow all ranges
};

/// The tensors of a case, its mask, and the expected result.
class ForwardProblem {
 public:
  ForwardProblem(const ForwardCase& c, std::vector<Slice> slices, std::mt19937& random);

  AttentionProblem on_host() const;
  ForwardCall on_device() const;
  /// The mask of keys [begin, end), in indices from begin on.
  std::vector<Slice> slices_of(Span keys) const;
  /// Asserts that the outputs are the double reference's.
  void expect_close() const;

 private:
  AttentionProblem options() const;

  ForwardCase case_;

 public:
  DeviceTensor q, k, v;
  Shape o_shape, lse_shape;
  DeviceFloats o, lse;

 private:
  std::vector<Slice> slices_;
  std::vector<float> sinks_;
  DeviceFloats sinks_device_;
};

/// In one call, in one over segments, or in a ring's calls, as the case says.
void run(const ForwardProblem& problem, const ForwardCase& c);

class Sm90 : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no GPU here";
  }
};

}  // namespace annulus
