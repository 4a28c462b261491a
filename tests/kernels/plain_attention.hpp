#pragma once

#include <span>
#include <vector>

#include "kernels/attention.hpp"

namespace annulus::testing {

/// What attention gives when each step of the textbook formula is carried out in the dtype of q:
/// products accumulated in f32, the matrices S, P and their gradients rounded to the dtype. The
/// backward starts from what a backward call is given, log-sum-exp and delta in f32. Its error sets
/// the tolerance of every kernel. Values in row-major order of each view's shape.
struct PlainAttention {
  std::vector<double> o;            // [batch, seq_q, q_heads, value_dim]
  std::vector<double> log_sum_exp;  // [batch, q_heads, seq_q]
  std::vector<double> grad_q, grad_k, grad_v;
  double largest_term = 1.0;      // of dP and delta, which cancel in the gradients
  double largest_logit = 0.0;     // of kept pairs, before soft cap and bias or after
  std::vector<double> grad_bias;  // [batch|1, q_heads|1, seq_q, seq_kv]
};

/// `lse` and `delta` are [batch, q_heads, seq_q].
PlainAttention plain_attention(const AttentionProblem& problem, ConstTensorView grad_o,
                               std::span<const double> lse, std::span<const double> delta);

}  // namespace annulus::testing
