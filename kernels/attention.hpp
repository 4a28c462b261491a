#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "kernels/mask.hpp"
#include "kernels/types.hpp"

namespace annulus {

/// From `local_begin` on, local row i stands at global position global_begin + (i - local_begin).
struct PositionRun {
  std::int64_t local_begin = 0;
  std::int64_t global_begin = 0;
};

/// Dropout by Philox keyed on the global (batch, query head, query, key): the same elements are
/// dropped for any number of ranks, threads or tiles. Empty runs: local positions are global.
struct Dropout {
  float probability = 0.0F;
  std::uint64_t seed = 0;
  std::int64_t batch_begin = 0;
  std::int64_t q_head_begin = 0;
  std::span<const PositionRun> q_positions;
  std::span<const PositionRun> k_positions;
};

/// Which KV head serves a query head: kv = (q_head + q_head_offset) / group_size. A rank whose
/// query heads start inside a group has an offset. group_size 0 means q_heads / kv_heads.
struct HeadGroups {
  std::int64_t group_size = 0;
  std::int64_t q_head_offset = 0;
};

/// Attention of one rank over local indices:
///   S = soft_cap·tanh(scale·QKᵀ / soft_cap) + bias, kept where a slice and the dense mask keep it,
///   O = dropout(softmax([S, sink])) V without the sink's column.
/// f32, f16, bf16 (f64 in the reference only). Any strides with head_dim contiguous.
struct AttentionProblem {
  ConstTensorView q;  // [batch, seq_q, q_heads, head_dim]
  ConstTensorView k;  // [batch, seq_kv, kv_heads, head_dim]
  ConstTensorView v;  // [batch, seq_kv, kv_heads, value_dim]
  SliceList mask;
  float scale = 1.0F;
  float soft_cap = 0.0F;  // 0: none
  HeadGroups groups;
  ConstTensorView sinks;       // f32 [q_heads], logits; absent: none
  ConstTensorView bias;        // f32|f16|bf16 [batch|1, q_heads|1, seq_q, seq_kv]
  ConstTensorView dense_mask;  // u8 [batch|1, q_heads|1, seq_q, seq_kv], non-zero keeps
  Dropout dropout;

  std::int64_t batch() const { return q.shape[0]; }
  std::int64_t seq_q() const { return q.shape[1]; }
  std::int64_t seq_kv() const { return k.shape[1]; }
  std::int64_t q_heads() const { return q.shape[2]; }
  std::int64_t kv_heads() const { return k.shape[2]; }
  std::int64_t head_dim() const { return q.shape[3]; }
  std::int64_t value_dim() const { return v.shape[3]; }
  std::int64_t kv_head_of(std::int64_t q_head) const {
    const std::int64_t group = groups.group_size > 0 ? groups.group_size : q_heads() / kv_heads();
    return (q_head + groups.q_head_offset) / group;
  }
};

/// Throws bad_data naming the first inconsistency of shapes, dtypes, heads or slices.
void validate(const AttentionProblem& problem);

/// Running softmax of each row, fp32 (f64 in the reference): what a later call resumes from.
/// Logits are natural (scaled, capped, biased). A row without keys: O = 0, max = −inf, sum = 0.
struct AttentionState {
  TensorView accumulator;  // [batch, seq_q, q_heads, value_dim], Σ exp(s − max)·v, unnormalised
  TensorView row_max;      // [batch, q_heads, seq_q]
  TensorView row_sum;      // [batch, q_heads, seq_q]
};

/// One forward call. Without `state` it starts fresh and must finish. With `state`: `start` says
/// whether the rows begin empty (sinks are folded in then, and only then) or resume, and the state
/// is written back unless the call finishes. With `o` it finishes: O = accumulator / sum in o's
/// dtype and, when present, log_sum_exp = max + ln(sum); a row without keys gives O = 0, LSE =
/// −inf.
struct ForwardCall {
  enum class Start : std::uint8_t { fresh, resume };

  AttentionProblem problem;
  AttentionState state;
  Start start = Start::fresh;
  TensorView o;            // [batch, seq_q, q_heads, value_dim]
  TensorView log_sum_exp;  // f32 [batch, q_heads, seq_q]
  Stream stream;
  /// A row's bits must not depend on which other rows the call has: no algorithm of its own for
  /// few rows. The CPU's backends keep to it.
  bool row_invariant = false;
  /// One of several calls in a row that carry a state. What was put on the stream since the call
  /// before writes nothing that this one reads but the state: one that resumes may begin where that
  /// one ends, and one without an output expects to be resumed so.
  bool chained = false;
};

/// One backward call: recomputes P from the global LSE and adds to fp32 gradients, so that a ring
/// accumulates over its steps. The caller clears them before the first call, dK and dV unless that
/// call overwrites them.
struct BackwardCall {
  AttentionProblem problem;
  ConstTensorView grad_o;       // [batch, seq_q, q_heads, value_dim]
  ConstTensorView log_sum_exp;  // f32 [batch, q_heads, seq_q], −inf for a row without keys
  ConstTensorView delta;        // f32 [batch, q_heads, seq_q], Σ_d dO·O (FlashAttention, eq. 4)
  TensorView grad_q;            // f32, shape of q; absent: not wanted
  TensorView grad_k;            // f32, shape of k
  TensorView grad_v;            // f32, shape of v
  TensorView grad_bias;         // f32, shape of bias; absent: not wanted
  bool deterministic = false;   // device kernels only: the CPU's are always
  Stream stream;
  /// [batch, seq_q, q_heads, value_dim] in q's dtype: cudnn reads it, and without it derives from
  /// delta what stands for it. The others need delta alone.
  ConstTensorView o = {};
  bool overwrites_kv = false;  // grad_k and grad_v are set, whatever they hold, not added to
};

enum class Direction : std::uint8_t { forward, backward };

/// One implementation. `unsupported` returns why it cannot serve a problem, or nothing.
struct AttentionBackend {
  std::string_view name;
  Device device;
  std::string (*unsupported)(const AttentionProblem& problem, Direction direction);
  void (*forward)(const ForwardCall& call);
  void (*backward)(const BackwardCall& call);
  bool overwrites_kv = false;  // on its own; else grad_k and grad_v are cleared before it
};

/// All backends in order of preference: sm90, cudnn, cuda's fallback, cpu, reference.
std::span<const AttentionBackend> attention_backends();

/// The first backend on q's device (or the named one) that supports the problem; throws usage with
/// every backend's reason when none does.
const AttentionBackend& select_backend(const AttentionProblem& problem, Direction direction,
                                       std::string_view name = {});

/// Both throw as validate() and select_backend() do, and bad_data for results of other shapes or
/// dtypes than said above; the reference's statistics, states, gradients and output may be f64.
void attention_forward(const ForwardCall& call, std::string_view backend = {});
void attention_backward(const BackwardCall& call, std::string_view backend = {});

/// delta[b,h,q] = Σ_d grad_o·o in fp32.
void attention_delta(ConstTensorView o, ConstTensorView grad_o, TensorView delta,
                     Stream stream = {});

/// grad_sinks[h] −= Σ_{b,q} exp(sink_h − LSE)·delta, accumulated in fp32.
void attention_sink_gradient(ConstTensorView sinks, ConstTensorView log_sum_exp,
                             ConstTensorView delta, TensorView grad_sinks, Stream stream = {});

/// into ← into ⊕ from: rescales both to the larger maximum and adds (associative up to rounding).
void merge(const AttentionState& from, const AttentionState& into, Stream stream = {});

/// Writes O and LSE of a state; either view may be absent.
void finish(const AttentionState& state, TensorView o, TensorView log_sum_exp, Stream stream = {});

}  // namespace annulus
