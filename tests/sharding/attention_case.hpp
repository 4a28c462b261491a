#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/attention.hpp"
#include "sharding/attention_plan.hpp"
#include "sharding/communicator.hpp"
#include "sharding/execution.hpp"

namespace annulus::testing {

/// One attention over whole tensors.
struct AttentionCase {
  std::string name;
  AttentionMask mask;
  std::int64_t batch = 1;
  std::int64_t seq_q = 0;
  std::int64_t seq_kv = 0;
  std::int64_t q_heads = 2;
  std::int64_t kv_heads = 1;
  std::int64_t head_dim = 8;
  std::int64_t value_dim = 8;
  float soft_cap = 0.0F;
  float dropout = 0.0F;
  bool sinks = false;
  bool bias = false;
  std::int64_t bias_heads = 0;  // 0: q_heads
  bool dense_mask = false;
  bool head_major = false;  // memory is [batch, heads, seq, dim]
};

/// f32 elements and a view of them as [batch, seq, heads, dim] or of any other shape.
struct HostTensor {
  std::vector<float> data;
  TensorView view;

  HostTensor() = default;
  explicit HostTensor(const Shape& shape, float value = 0.0F);
  HostTensor(const HostTensor& other);
  HostTensor& operator=(const HostTensor& other);
};

/// What goes in and what comes out, for the whole sequence.
struct AttentionTensors {
  HostTensor q, k, v, sinks, bias, grad_o;
  std::vector<std::uint8_t> dense_mask;
  HostTensor o, lse, delta, grad_q, grad_k, grad_v, grad_bias;
};

/// Random inputs; outputs hold NaN.
AttentionTensors random_tensors(const AttentionCase& c, std::uint64_t seed);

/// Fills the outputs by the reference in double.
void run_reference(const AttentionCase& c, AttentionTensors& tensors);

/// Fills the outputs by `request`'s scheme: every rank takes its rows, computes, and puts its
/// results back. Local buffers that a rank writes start as NaN, gradients as 0.
struct RunOptions {
  bool backward = true;
  ExecuteOptions execute;
  std::uint64_t delay_seed = 0;
  int ranks_per_node = 0;
};
void run_on_threads(const AttentionCase& c, const std::shared_ptr<const PlanRequest>& request,
                    AttentionTensors& tensors, const RunOptions& options = {});
/// One rank's part of it.
void run_rank(Communicator& ranks, const AttentionCase& c,
              const std::shared_ptr<const PlanRequest>& request, AttentionTensors& tensors,
              const RunOptions& options = {});

/// A request for the case; its layouts are `q` and `kv`.
std::shared_ptr<PlanRequest> request_of(const AttentionCase& c, Scheme scheme,
                                        const SequenceLayout& q, const SequenceLayout& kv);

/// Largest difference of two tensors, NaN counting as infinite; −inf equals −inf.
double max_difference(const HostTensor& a, const HostTensor& b);
bool same_bits(const HostTensor& a, const HostTensor& b);

/// Compares outputs: O and LSE within 2e-5, gradients within 1e-4 of their norm.
void expect_equal(const AttentionCase& c, const AttentionTensors& found,
                  const AttentionTensors& expected, bool backward = true);

}  // namespace annulus::testing
