#include "kernels/attention_reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/element.hpp"
#include "kernels/philox.hpp"

namespace annulus::kernels::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Row {
  std::int64_t b = 0;
  std::int64_t h = 0;
  std::int64_t q = 0;
};

// Element offset of [b, s, h, 0] in a view [batch, seq, heads, dim].
std::int64_t row_offset(const ConstTensorView& view, std::int64_t b, std::int64_t s,
                        std::int64_t h) {
  return b * view.strides[0] + s * view.strides[1] + h * view.strides[2];
}

// Element offset of [b, h, q] in a view [batch, heads, seq].
std::int64_t statistic_offset(const ConstTensorView& view, const Row& row) {
  return row.b * view.strides[0] + row.h * view.strides[1] + row.q * view.strides[2];
}

// Element offset of [b, h, q, k] where extents of 1 in batch and heads are broadcast.
std::int64_t pair_offset(const ConstTensorView& view, const Row& row, std::int64_t k) {
  const std::int64_t b = view.shape[0] == 1 ? 0 : row.b;
  const std::int64_t h = view.shape[1] == 1 ? 0 : row.h;
  return b * view.strides[0] + h * view.strides[1] + row.q * view.strides[2] + k * view.strides[3];
}

double load(const ConstTensorView& view, std::int64_t offset) {
  return load_element(view.data, view.dtype, offset);
}

void add(const TensorView& view, std::int64_t offset, double value) {
  store_element(view.data, view.dtype, offset, load(view, offset) + value);
}

double dot(const ConstTensorView& a, std::int64_t a_offset, const ConstTensorView& b,
           std::int64_t b_offset) {
  double sum = 0.0;
  for (std::int64_t d = 0; d < a.shape[3]; ++d) {
    sum += load(a, a_offset + d * a.strides[3]) * load(b, b_offset + d * b.strides[3]);
  }
  return sum;
}

std::int64_t global_position(std::span<const PositionRun> runs, std::int64_t local) {
  if (runs.empty()) return local;
  const auto after =
      std::upper_bound(runs.begin(), runs.end(), local,
                       [](std::int64_t i, const PositionRun& run) { return i < run.local_begin; });
  const PositionRun& run = *(after - 1);
  return run.global_begin + (local - run.local_begin);
}

// 1 / (1 − p) for an element that dropout keeps, else 0.
double dropout_factor(const Dropout& dropout, const Row& row, std::int64_t k) {
  if (dropout.probability <= 0.0F) return 1.0;
  const bool kept = dropout_keeps(dropout.seed, dropout_threshold(dropout.probability),
                                  row.b + dropout.batch_begin, row.h + dropout.q_head_begin,
                                  global_position(dropout.q_positions, row.q),
                                  global_position(dropout.k_positions, k));
  return kept ? 1.0 / (1.0 - static_cast<double>(dropout.probability)) : 0.0;
}

struct Logit {
  std::int64_t k = 0;
  double value = 0.0;
  double cap_slope = 1.0;  // d(capped) / d(scaled)
};

Logit logit_of(const AttentionProblem& problem, const Row& row, std::int64_t k) {
  const double raw = static_cast<double>(problem.scale) *
                     dot(problem.q, row_offset(problem.q, row.b, row.q, row.h), problem.k,
                         row_offset(problem.k, row.b, k, problem.kv_head_of(row.h)));
  Logit logit{k, raw, 1.0};
  if (problem.soft_cap > 0.0F) {
    const double cap = static_cast<double>(problem.soft_cap);
    const double squashed = std::tanh(raw / cap);
    logit.value = cap * squashed;
    logit.cap_slope = 1.0 - squashed * squashed;
  }
  if (problem.bias) logit.value += load(problem.bias, pair_offset(problem.bias, row, k));
  return logit;
}

// Logits of the keys that slices and the dense mask keep for one row.
std::vector<Logit> kept_logits(const AttentionProblem& problem, const Row& row) {
  std::vector<Logit> logits;
  for (const Slice& slice : problem.mask.of_batch(row.b)) {
    if (!slice.q.contains(row.q)) continue;
    const Span keys = intersect(slice.k, slice.band.keys_of(row.q));
    for (std::int64_t k = keys.begin; k < keys.end; ++k) {
      const ConstTensorView& dense = problem.dense_mask;
      if (dense && load(dense, pair_offset(dense, row, k)) == 0.0) continue;
      logits.push_back(logit_of(problem, row, k));
    }
  }
  return logits;
}

struct RowState {
  double max = -kInfinity;
  double sum = 0.0;
  std::vector<double> accumulator;
};

RowState start_row(const ForwardCall& call, const Row& row) {
  RowState state;
  state.accumulator.resize(static_cast<std::size_t>(call.problem.value_dim()));
  if (call.start == ForwardCall::Start::resume) {
    const AttentionState& carried = call.state;
    state.max = load(carried.row_max, statistic_offset(carried.row_max, row));
    state.sum = load(carried.row_sum, statistic_offset(carried.row_sum, row));
    const std::int64_t offset = row_offset(carried.accumulator, row.b, row.q, row.h);
    for (std::size_t d = 0; d < state.accumulator.size(); ++d) {
      state.accumulator[d] = load(carried.accumulator, offset + static_cast<std::int64_t>(d) *
                                                                    carried.accumulator.strides[3]);
    }
  } else if (call.problem.sinks) {
    state.max = load(call.problem.sinks, row.h * call.problem.sinks.strides[0]);
    state.sum = state.max == -kInfinity ? 0.0 : 1.0;
  }
  return state;
}

void add_keys(const AttentionProblem& problem, const Row& row, RowState& state) {
  const std::vector<Logit> logits = kept_logits(problem, row);
  double max = state.max;
  for (const Logit& logit : logits) max = max_or_nan(max, logit.value);
  if (max == -kInfinity) return;
  const double rescale = std::exp(state.max - max);
  state.sum *= rescale;
  for (double& value : state.accumulator) value *= rescale;
  for (const Logit& logit : logits) {
    const double weight = std::exp(logit.value - max);
    state.sum += weight;
    const double kept = weight * dropout_factor(problem.dropout, row, logit.k);
    const std::int64_t offset = row_offset(problem.v, row.b, logit.k, problem.kv_head_of(row.h));
    for (std::size_t d = 0; d < state.accumulator.size(); ++d) {
      state.accumulator[d] +=
          kept * load(problem.v, offset + static_cast<std::int64_t>(d) * problem.v.strides[3]);
    }
  }
  state.max = max;
}

void write_row(const TensorView& view, const Row& row, const std::vector<double>& values,
               double factor) {
  const std::int64_t offset = row_offset(view, row.b, row.q, row.h);
  for (std::size_t d = 0; d < values.size(); ++d) {
    store_element(view.data, view.dtype, offset + static_cast<std::int64_t>(d) * view.strides[3],
                  values[d] * factor);
  }
}

void write_statistic(const TensorView& view, const Row& row, double value) {
  store_element(view.data, view.dtype, statistic_offset(view, row), value);
}

void end_row(const ForwardCall& call, const Row& row, const RowState& state) {
  if (!call.o) {
    write_row(call.state.accumulator, row, state.accumulator, 1.0);
    write_statistic(call.state.row_max, row, state.max);
    write_statistic(call.state.row_sum, row, state.sum);
    return;
  }
  const bool empty = state.max == -kInfinity;
  write_row(call.o, row, state.accumulator, empty ? 0.0 : 1.0 / state.sum);
  if (call.log_sum_exp) {
    write_statistic(call.log_sum_exp, row, empty ? -kInfinity : state.max + std::log(state.sum));
  }
}

void backward_pair(const BackwardCall& call, const Row& row, const Logit& logit, double lse,
                   double delta) {
  const AttentionProblem& problem = call.problem;
  const std::int64_t kv_head = problem.kv_head_of(row.h);
  const std::int64_t q_at = row_offset(problem.q, row.b, row.q, row.h);
  const std::int64_t k_at = row_offset(problem.k, row.b, logit.k, kv_head);
  const std::int64_t v_at = row_offset(problem.v, row.b, logit.k, kv_head);
  const std::int64_t o_at = row_offset(call.grad_o, row.b, row.q, row.h);
  const double p = std::exp(logit.value - lse);
  const double factor = dropout_factor(problem.dropout, row, logit.k);
  const double grad_logit = p * (factor * dot(call.grad_o, o_at, problem.v, v_at) - delta);
  if (call.grad_bias) add(call.grad_bias, pair_offset(call.grad_bias, row, logit.k), grad_logit);
  const double grad_product = grad_logit * logit.cap_slope * static_cast<double>(problem.scale);
  for (std::int64_t d = 0; call.grad_q && d < problem.head_dim(); ++d) {
    add(call.grad_q, row_offset(call.grad_q, row.b, row.q, row.h) + d * call.grad_q.strides[3],
        grad_product * load(problem.k, k_at + d * problem.k.strides[3]));
  }
  for (std::int64_t d = 0; call.grad_k && d < problem.head_dim(); ++d) {
    add(call.grad_k, row_offset(call.grad_k, row.b, logit.k, kv_head) + d * call.grad_k.strides[3],
        grad_product * load(problem.q, q_at + d * problem.q.strides[3]));
  }
  for (std::int64_t d = 0; call.grad_v && d < problem.value_dim(); ++d) {
    add(call.grad_v, row_offset(call.grad_v, row.b, logit.k, kv_head) + d * call.grad_v.strides[3],
        p * factor * load(call.grad_o, o_at + d * call.grad_o.strides[3]));
  }
}

template <typename Visit>
void for_each_row(const AttentionProblem& problem, Visit visit) {
  for (std::int64_t b = 0; b < problem.batch(); ++b) {
    for (std::int64_t h = 0; h < problem.q_heads(); ++h) {
      for (std::int64_t q = 0; q < problem.seq_q(); ++q) visit(Row{b, h, q});
    }
  }
}

}  // namespace

std::string unsupported(const AttentionProblem& problem, Direction /*direction*/) {
  return problem.q.device == Device::cpu ? "" : "host tensors only";
}

void forward(const ForwardCall& call) {
  for_each_row(call.problem, [&](const Row& row) {
    RowState state = start_row(call, row);
    add_keys(call.problem, row, state);
    end_row(call, row, state);
  });
}

void backward(const BackwardCall& call) {
  for_each_row(call.problem, [&](const Row& row) {
    const double lse = load(call.log_sum_exp, statistic_offset(call.log_sum_exp, row));
    if (lse == -kInfinity) return;
    const double delta = load(call.delta, statistic_offset(call.delta, row));
    for (const Logit& logit : kept_logits(call.problem, row)) {
      backward_pair(call, row, logit, lse, delta);
    }
  });
}

}  // namespace annulus::kernels::reference
