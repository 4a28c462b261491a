#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/tensor.hpp"
#include "sharding/execution.hpp"

namespace annulus::testing {

/// Numbers from -1 to 1, on the device.
void randomize(const TensorView& values, std::uint64_t seed);

/// NaN counts as infinite.
double largest_difference(const Tensor& a, const Tensor& b);

/// One rank's random rows on its device, bf16, and what passes over them make.
class DeviceShards {
 public:
  /// `head_major`: the memory of q and O is [batch, heads, rows, dim].
  DeviceShards(const PlanRequest& request, int rank, std::int64_t head_dim,
               bool head_major = false);

  void change(std::uint64_t seed);
  /// Results begin as NaN. Returns O.
  Tensor forward(Communicator& ranks, const AttentionPlan& plan,
                 const ExecuteOptions& options = {});
  Tensor log_sum_exp() const { return Tensor::copy_of(lse_.view(), {}, Device::cpu); }
  /// dQ, dK, dV for the last forward() with the same rows, added to numbers.
  std::vector<Tensor> backward(Communicator& ranks, const AttentionPlan& plan,
                               const ExecuteOptions& options = {});

 private:
  TensorView seen(Tensor& rows) const;
  AttentionProblem problem();

  Shape q_shape_, kv_shape_;
  bool head_major_;
  std::uint64_t seed_ = 0;
  Tensor q_, k_, v_, grad_o_, o_, lse_, delta_;
};

}  // namespace annulus::testing
