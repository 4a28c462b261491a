#pragma once

#include <cstdint>

#include "kernels/attention.hpp"
#include "runtime/tensor.hpp"
#include "sharding/attention_plan.hpp"
#include "sharding/cost_model.hpp"

namespace annulus::launch {

/// A rank's shards of one attention over random values, forward and backward, on the host or on its
/// device.
class RankAttention {
 public:
  RankAttention(const PlanRequest& request, const AttentionSizes& sizes, DType dtype, int rank,
                Device device);
  /// Of another number of rows.
  RankAttention(const PlanRequest& request, const AttentionSizes& sizes, DType dtype, int rank,
                Device device, std::int64_t q_rows, std::int64_t kv_rows);

  /// Masks are the caller's.
  ForwardCall forward();
  /// After a forward call and compute_delta().
  BackwardCall backward();
  void compute_delta();

 private:
  Shape q_rows_;
  Shape kv_rows_;
  Shape statistics_;
  Tensor q_, k_, v_, grad_o_, o_, lse_, delta_, grad_q_, grad_k_, grad_v_;
};

}  // namespace annulus::launch
