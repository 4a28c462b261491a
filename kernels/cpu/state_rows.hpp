#pragma once

#include "kernels/attention.hpp"

namespace annulus::kernels::cpu {

/// Whether the functions below take these views: host, f32 (o: f32, f16 or bf16), head_dim
/// contiguous and a multiple of 8.
bool takes_rows(ConstTensorView rows);
bool takes_statistic(ConstTensorView statistic);
bool takes_state(const AttentionState& state);

/// The vector forms of merge, finish, attention_delta and attention_sink_gradient: rows spread over
/// threads, each row by one thread, so that the bits do not depend on their number.
void merge_states(const AttentionState& from, const AttentionState& into);
void finish_state(const AttentionState& state, const TensorView& o, const TensorView& log_sum_exp);
void copy_state(const AttentionState& from, const AttentionState& to);
void delta(const ConstTensorView& o, const ConstTensorView& grad_o, const TensorView& delta);
void sink_gradient(const ConstTensorView& sinks, const ConstTensorView& log_sum_exp,
                   const ConstTensorView& delta, const TensorView& grad_sinks);

}  // namespace annulus::kernels::cpu
