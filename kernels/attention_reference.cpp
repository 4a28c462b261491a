#include "kernels/attention_reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
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

/// Rows [batch b, seq, head h] of a view as dense doubles: loops over them vectorise.
class DenseRows {
 public:
  explicit DenseRows(std::int64_t dim) : dim_(static_cast<std::size_t>(dim)) {}

  void load_head(const ConstTensorView& view, std::int64_t b, std::int64_t h) {
    values_.resize(static_cast<std::size_t>(view.shape[1]) * dim_);
    for (std::int64_t s = 0; s < view.shape[1]; ++s) load_row(view, row_offset(view, b, s, h), s);
  }
  void load_one(const ConstTensorView& view, std::int64_t offset) {
    values_.resize(dim_);
    load_row(view, offset, 0);
  }
  void clear(std::int64_t rows) { values_.assign(static_cast<std::size_t>(rows) * dim_, 0.0); }
  /// Adds the rows to [batch b, seq, head h] of a view.
  void add_to_head(const TensorView& view, std::int64_t b, std::int64_t h) const {
    for (std::int64_t s = 0; s < view.shape[1]; ++s) {
      const std::int64_t offset = row_offset(view, b, s, h);
      const std::span<const double> values = row(s);
      for (std::size_t d = 0; d < dim_; ++d) {
        add(view, offset + static_cast<std::int64_t>(d) * view.strides[3], values[d]);
      }
    }
  }
  std::span<const double> row(std::int64_t s) const {
    return {values_.data() + static_cast<std::size_t>(s) * dim_, dim_};
  }
  std::span<double> row(std::int64_t s) {
    return {values_.data() + static_cast<std::size_t>(s) * dim_, dim_};
  }

 private:
  void load_row(const ConstTensorView& view, std::int64_t offset, std::int64_t s) {
    for (std::size_t d = 0; d < dim_; ++d) {
      row(s)[d] = load(view, offset + static_cast<std::int64_t>(d) * view.strides[3]);
    }
  }

  std::size_t dim_;
  std::vector<double> values_;
};

double dot(std::span<const double> a, std::span<const double> b) {
  double sum = 0.0;
  for (std::size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

void add_scaled(double factor, std::span<const double> from, std::span<double> into) {
  for (std::size_t d = 0; d < into.size(); ++d) into[d] += factor * from[d];
}

/// Keys and values of the KV head at hand, and the query row at hand.
struct Operands {
  explicit Operands(const AttentionProblem& problem)
      : q(problem.head_dim()), k(problem.head_dim()), v(problem.value_dim()) {}

  DenseRows q;
  DenseRows k;
  DenseRows v;
};

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

Logit logit_of(const AttentionProblem& problem, const Operands& operands, const Row& row,
               std::int64_t k) {
  const double raw = static_cast<double>(problem.scale) * dot(operands.q.row(0), operands.k.row(k));
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
std::vector<Logit> kept_logits(const AttentionProblem& problem, const Operands& operands,
                               const Row& row) {
  std::vector<Logit> logits;
  for (const Slice& slice : problem.mask.of_batch(row.b)) {
    if (!slice.q.contains(row.q)) continue;
    const Span keys = intersect(slice.k, slice.band.keys_of(row.q));
    for (std::int64_t k = keys.begin; k < keys.end; ++k) {
      const ConstTensorView& dense = problem.dense_mask;
      if (dense && load(dense, pair_offset(dense, row, k)) == 0.0) continue;
      logits.push_back(logit_of(problem, operands, row, k));
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

void add_keys(const AttentionProblem& problem, const Operands& operands, const Row& row,
              RowState& state) {
  const std::vector<Logit> logits = kept_logits(problem, operands, row);
  double max = state.max;
  for (const Logit& logit : logits) max = max_or_nan(max, logit.value);
  if (max == -kInfinity) return;
  const double rescale = std::exp(state.max - max);
  state.sum *= rescale;
  for (double& value : state.accumulator) value *= rescale;
  for (const Logit& logit : logits) {
    const double weight = std::exp(logit.value - max);
    state.sum += weight;
    add_scaled(weight * dropout_factor(problem.dropout, row, logit.k), operands.v.row(logit.k),
               state.accumulator);
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

/// Gradients of one KV head in double, rounded once when they are added to the call's.
struct Gradients {
  explicit Gradients(const AttentionProblem& problem)
      : q(problem.head_dim()), k(problem.head_dim()), v(problem.value_dim()) {}

  DenseRows q;  // of the query row at hand
  DenseRows k;
  DenseRows v;
};

void backward_pair(const BackwardCall& call, const Operands& operands,
                   std::span<const double> grad_o, const Row& row, const Logit& logit, double lse,
                   double delta, Gradients& gradients) {
  const AttentionProblem& problem = call.problem;
  const double p = std::exp(logit.value - lse);
  const double factor = dropout_factor(problem.dropout, row, logit.k);
  const double grad_logit = p * (factor * dot(grad_o, operands.v.row(logit.k)) - delta);
  if (call.grad_bias) add(call.grad_bias, pair_offset(call.grad_bias, row, logit.k), grad_logit);
  const double grad_product = grad_logit * logit.cap_slope * static_cast<double>(problem.scale);
  add_scaled(grad_product, operands.k.row(logit.k), gradients.q.row(0));
  add_scaled(grad_product, operands.q.row(0), gradients.k.row(logit.k));
  add_scaled(p * factor, grad_o, gradients.v.row(logit.k));
}

void backward_row(const BackwardCall& call, const Operands& operands, const Row& row,
                  Gradients& gradients) {
  const double lse = load(call.log_sum_exp, statistic_offset(call.log_sum_exp, row));
  if (lse == -kInfinity) return;
  const double delta = load(call.delta, statistic_offset(call.delta, row));
  DenseRows grad_o(call.problem.value_dim());
  grad_o.load_one(call.grad_o, row_offset(call.grad_o, row.b, row.q, row.h));
  gradients.q.clear(1);
  for (const Logit& logit : kept_logits(call.problem, operands, row)) {
    backward_pair(call, operands, grad_o.row(0), row, logit, lse, delta, gradients);
  }
  if (!call.grad_q) return;
  const std::int64_t offset = row_offset(call.grad_q, row.b, row.q, row.h);
  const std::span<const double> values = std::as_const(gradients.q).row(0);
  for (std::size_t d = 0; d < values.size(); ++d) {
    add(call.grad_q, offset + static_cast<std::int64_t>(d) * call.grad_q.strides[3], values[d]);
  }
}

// Visits (batch, query head) with the keys and values of its KV head loaded.
template <typename Visit>
void for_each_head(const AttentionProblem& problem, Visit visit) {
  Operands operands(problem);
  for (std::int64_t b = 0; b < problem.batch(); ++b) {
    std::int64_t loaded = -1;
    for (std::int64_t h = 0; h < problem.q_heads(); ++h) {
      const std::int64_t kv_head = problem.kv_head_of(h);
      if (kv_head != loaded) {
        operands.k.load_head(problem.k, b, kv_head);
        operands.v.load_head(problem.v, b, kv_head);
        loaded = kv_head;
      }
      visit(b, h, operands);
    }
  }
}

void load_query(const AttentionProblem& problem, const Row& row, Operands& operands) {
  operands.q.load_one(problem.q, row_offset(problem.q, row.b, row.q, row.h));
}

}  // namespace

std::string unsupported(const AttentionProblem& problem, Direction /*direction*/) {
  return problem.q.device == Device::cpu ? "" : "host tensors only";
}

void forward(const ForwardCall& call) {
  for_each_head(call.problem, [&](std::int64_t b, std::int64_t h, Operands& operands) {
    for (std::int64_t q = 0; q < call.problem.seq_q(); ++q) {
      const Row row{b, h, q};
      load_query(call.problem, row, operands);
      RowState state = start_row(call, row);
      add_keys(call.problem, operands, row, state);
      end_row(call, row, state);
    }
  });
}

void backward(const BackwardCall& call) {
  const AttentionProblem& problem = call.problem;
  Gradients gradients(problem);
  for_each_head(problem, [&](std::int64_t b, std::int64_t h, Operands& operands) {
    gradients.k.clear(problem.seq_kv());
    gradients.v.clear(problem.seq_kv());
    for (std::int64_t q = 0; q < problem.seq_q(); ++q) {
      const Row row{b, h, q};
      load_query(problem, row, operands);
      backward_row(call, operands, row, gradients);
    }
    const std::int64_t kv_head = problem.kv_head_of(h);
    if (call.grad_k) gradients.k.add_to_head(call.grad_k, b, kv_head);
    if (call.grad_v) gradients.v.add_to_head(call.grad_v, b, kv_head);
  });
}

}  // namespace annulus::kernels::reference
