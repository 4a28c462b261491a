#pragma once

#include <random>
#include <string>
#include <vector>

#include "device_tensor.hpp"
#include "kernels/attention.hpp"
#include "random_slices.hpp"

namespace annulus {

struct BackwardCase {
  std::int64_t batch, seq_q, seq_kv, q_heads, kv_heads, head_dim, value_dim;
  DType dtype;
  float soft_cap = 0.0F;
  bool sinks = false;
  int steps = 1;           // calls over parts of the keys, as a ring makes them
  bool unaligned = false;  // gradients at addresses and strides that no copy engine takes
  bool deterministic = false;
  bool overwrites_kv = false;  // dK and dV hold NaN before
};

struct Gradients {
  std::vector<double> q, k, v;
};

/// fp32 gradients inside padding of NaN, cleared.
struct DeviceGradient {
  Shape shape;
  Buffer memory;
  TensorView view;

  DeviceGradient(const Shape& shape_, bool unaligned);
  void clear() const;
  void fill(float value) const;
  std::vector<float> fetched() const;
  /// Whether the padding still holds what it was filled with.
  bool padding_untouched() const;
};

/// The tensors of a case, its mask, what the double reference gives, and what plain attention in
/// the element type gives, which rounds the scores, P, dP, dS and the results.
class BackwardProblem {
 public:
  BackwardProblem(const BackwardCase& c, std::vector<Slice> slices, std::uint32_t seed);

  /// Host work: the expected gradients. May run beside other problems' on threads.
  void solve();
  /// Device work: log-sum-exp and delta come from the host's solution.
  void run() const;
  /// Empty, or what breaks the rule max|x − ref| <= 2·max|plain − ref| + atol (FlashAttention's
  /// tests; atol = 2·max|(ref + 0.3) − 0.3 − ref| in the element type; 3 instead of 2 with a cap).
  std::string failure() const;
  std::string words() const;

  BackwardCall call() const;
  /// The gradients as the first call wants them.
  void clear() const;

  BackwardCase c;
  std::vector<Slice> slices;
  std::mt19937 random;
  DeviceTensor q, k, v, grad_o;
  DeviceGradient grad_q, grad_k, grad_v;
  Shape row_shape;
  DeviceFloats lse, delta;

 private:
  AttentionProblem host_problem() const;
  void solve_plain(const std::vector<double>& o);
  std::string compare(const DeviceGradient& actual, const std::vector<double>& expected,
                      const std::vector<double>& plain, const char* what) const;

  std::vector<float> sinks_;
  std::vector<double> lse_, delta_;
  Gradients expected_, plain_;
};

}  // namespace annulus
