#include "launch/verify_gradients.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/attention_reference.hpp"
#include "kernels/error.hpp"
#include "launch/attention_cut.hpp"
#include "launch/sampled_rows.hpp"
#include "runtime/selection.hpp"

namespace annulus::launch {
namespace {

// Products of the double loops that all ranks share, for queries and for keys: a second of one
// core.
constexpr double kWork = 6e8;
constexpr std::uint64_t kSeed = 20240301;
constexpr std::size_t kMostKeyHeads = 16;  // each takes all queries of its group
constexpr std::int64_t kQueriesAtOnce = 4096;

enum Gradient : std::size_t { kQuery, kKey, kValue };

/// Sums over the compared elements.
struct Sums {
  std::array<double, 3> differences{};  // squared
  std::array<double, 3> expected{};     // squared
  std::array<double, 3> terms{};        // squared: what cancels in them, see compare()
  std::array<double, 3> elements{};
  std::array<double, 3> rows{};
};

std::size_t elements(std::int64_t rows, std::int64_t dim) {
  return static_cast<std::size_t>(rows * dim);
}

/// Of the sampled keys of a head; of dK also with a larger delta.
struct KeyGradients {
  std::vector<double> key, value, shifted_key;
};

class GradientCheck {
 public:
  GradientCheck(Communicator& alone, const Hdf5File& output, const Checkpoint& input,
                const RunOptions& options, const MaskSlices& mask)
      : alone_(alone), output_(output), input_(input), options_(options), mask_(mask) {
    const std::vector<std::string> paths = output.dataset_paths();
    const auto find = [&](const std::string& name) -> std::optional<DatasetInfo> {
      const std::string path = "output/" + name;
      if (std::find(paths.begin(), paths.end(), path) == paths.end()) return std::nullopt;
      return output.describe(path);
    };
    for (std::size_t i = 0; i < stored_.size(); ++i) {
      stored_[i] = find("grad_" + std::string(GradientErrors::kNames[i]));
      if (stored_[i]) require_shape(*stored_[i], input.shape(static_cast<CheckpointField>(i)));
    }
    outputs_ = find("attention_outputs");
    log_sum_exp_ = find("log_sum_exp");
  }

  bool has(std::size_t gradient) const {
    const bool whole = gradient == kQuery || (outputs_ && log_sum_exp_);
    return stored_[gradient] && whole && input_.has(CheckpointField::grad_output);
  }

  void check_queries(const RowSample& sample);
  void check_keys(const RowSample& sample);
  const Sums& sums() const { return sums_; }

 private:
  void require_shape(const DatasetInfo& dataset, const Shape& shape) const {
    require(dataset.shape == shape, ExitCode::bad_data,
            "verify: {}: {} has shape {}, the input {} leads to {}", output_.path(), dataset.path,
            dataset.shape.to_string(), input_.file().path(), shape.to_string());
  }
  std::vector<double> read(const DatasetInfo& dataset, const Selection& selection) const {
    std::vector<double> values(static_cast<std::size_t>(selection.shape().elements()));
    output_.read(dataset, selection, {values.data(), DType::f64, selection.shape()});
    return values;
  }
  FieldPart grad_output(const AttentionCut& cut) const {
    const Selection rows = Selection(input_.shape(CheckpointField::grad_output))
                               .set(0, {{cut.batch, cut.batch + 1}})
                               .set(1, cut.queries)
                               .set(2, {{cut.q_head, cut.q_head + 1}});
    const DType dtype = options_.dtype.value_or(input_.dtype(CheckpointField::grad_output));
    return FieldPart(alone_, input_, CheckpointField::grad_output, rows, dtype);
  }
  /// What queries at hand add to the gradients of the sampled keys.
  void add_keys(const AttentionCut& cut, KeyGradients& sums);
  /// dP − delta cancels where a row has few keys or one that outweighs the others, down to rounding
  /// errors of delta's size; a gradient is linear in delta, so what lies between `expected` and
  /// `with_larger_delta` tells how large these may be.
  void compare(Gradient gradient, const RowSample& sample, const std::vector<double>& expected,
               const std::vector<double>& with_larger_delta);

  Communicator& alone_;
  const Hdf5File& output_;
  const Checkpoint& input_;
  const RunOptions& options_;
  const MaskSlices& mask_;
  std::array<std::optional<DatasetInfo>, 3> stored_;
  std::optional<DatasetInfo> outputs_;
  std::optional<DatasetInfo> log_sum_exp_;
  Sums sums_;
};

/// delta = Σ_d dO·O of each row (FlashAttention, eq. 4).
std::vector<double> delta_of(const std::vector<double>& outputs, const FieldPart& grad_o) {
  const Shape& shape = grad_o.view().shape;
  const auto dim = static_cast<std::size_t>(shape[3]);
  const auto* grad = static_cast<const double*>(grad_o.view().data);
  std::vector<double> delta(static_cast<std::size_t>(shape[1]));
  for (std::size_t row = 0; row < delta.size(); ++row) {
    const double* o = outputs.data() + row * dim;
    delta[row] = std::inner_product(o, o + dim, grad + row * dim, 0.0);
  }
  return delta;
}

BackwardCall call_of(const CutAttention& cut, const FieldPart& grad_o,
                     const std::vector<double>& log_sum_exp, const std::vector<double>& delta) {
  const Shape statistics{1, 1, cut.problem().seq_q()};
  BackwardCall call;
  call.problem = cut.problem();
  call.grad_o = grad_o.view();
  call.log_sum_exp = ConstTensorView(log_sum_exp.data(), DType::f64, statistics);
  call.delta = ConstTensorView(delta.data(), DType::f64, statistics);
  return call;
}

/// Σ_d |dO·O| of each row: what delta's rounding goes by.
std::vector<double> magnitudes_of_delta(std::vector<double> outputs, const FieldPart& grad_o) {
  const auto* grad = static_cast<const double*>(grad_o.view().data);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    outputs[i] = std::copysign(outputs[i], grad[i]);
  }
  return delta_of(outputs, grad_o);
}

/// A larger delta: by the size of what it sums.
std::vector<double> shifted(std::vector<double> delta, const std::vector<double>& outputs,
                            const FieldPart& grad_o) {
  const std::vector<double> sizes = magnitudes_of_delta(outputs, grad_o);
  for (std::size_t i = 0; i < delta.size(); ++i) delta[i] += sizes[i];
  return delta;
}

void GradientCheck::check_queries(const RowSample& sample) {
  const AttentionCut rows = row_cut(input_, sample);
  const CutAttention cut(alone_, input_, options_, mask_, rows);
  const DoubleRows expected = recompute(cut);
  const FieldPart grad_o = grad_output(rows);
  const std::vector<double> delta = delta_of(expected.outputs, grad_o);
  BackwardCall call = call_of(cut, grad_o, expected.log_sum_exp, delta);
  std::vector<double> grad_q(elements(call.problem.seq_q(), call.problem.head_dim()));
  call.grad_q = {grad_q.data(), DType::f64, call.problem.q.shape};
  kernels::reference::backward(call);
  std::vector<double> shifted_q(grad_q.size());
  const std::vector<double> larger = shifted(delta, expected.outputs, grad_o);
  call.delta = ConstTensorView(larger.data(), DType::f64, call.delta.shape);
  call.grad_q.data = shifted_q.data();
  kernels::reference::backward(call);
  compare(kQuery, sample, grad_q, shifted_q);
}

void GradientCheck::add_keys(const AttentionCut& part, KeyGradients& sums) {
  const CutAttention cut(alone_, input_, options_, mask_, part);
  const FieldPart grad_o = grad_output(part);
  const Span batch{part.batch, part.batch + 1};
  const Span head{part.q_head, part.q_head + 1};
  const std::vector<double> outputs = read(
      *outputs_, Selection(outputs_->shape).set(0, {batch}).set(1, part.queries).set(2, {head}));
  const std::vector<double> log_sum_exp =
      read(*log_sum_exp_,
           Selection(log_sum_exp_->shape).set(0, {batch}).set(1, {head}).set(2, part.queries));
  const std::vector<double> delta = delta_of(outputs, grad_o);
  BackwardCall call = call_of(cut, grad_o, log_sum_exp, delta);
  call.grad_k = {sums.key.data(), DType::f64, call.problem.k.shape};
  call.grad_v = {sums.value.data(), DType::f64, call.problem.v.shape};
  kernels::reference::backward(call);
  const std::vector<double> larger = shifted(delta, outputs, grad_o);
  call.delta = ConstTensorView(larger.data(), DType::f64, call.delta.shape);
  call.grad_k.data = sums.shifted_key.data();
  call.grad_v = {};
  kernels::reference::backward(call);
}

void GradientCheck::check_keys(const RowSample& sample) {
  const Shape& queries = input_.shape(CheckpointField::query);
  const Shape& keys = input_.shape(CheckpointField::key);
  const std::int64_t group = queries[2] / keys[2];
  const auto rows = static_cast<std::int64_t>(sample.rows.size());
  KeyGradients sums;
  sums.key.resize(elements(rows, keys[3]));
  sums.shifted_key.resize(sums.key.size());
  sums.value.resize(elements(rows, input_.shape(CheckpointField::value)[3]));
  for (std::int64_t q_head = sample.head * group; q_head < (sample.head + 1) * group; ++q_head) {
    for (std::int64_t begin = 0; begin < queries[1]; begin += kQueriesAtOnce) {
      const Span part{begin, std::min(begin + kQueriesAtOnce, queries[1])};
      add_keys({sample.batch, q_head, {part}, single_rows(sample.rows)}, sums);
    }
  }
  if (has(kKey)) compare(kKey, sample, sums.key, sums.shifted_key);
  if (has(kValue)) compare(kValue, sample, sums.value, sums.value);  // delta plays no part
}

void GradientCheck::compare(Gradient gradient, const RowSample& sample,
                            const std::vector<double>& expected,
                            const std::vector<double>& with_larger_delta) {
  const DatasetInfo& dataset = *stored_[gradient];
  const std::vector<double> found = read(dataset, Selection(dataset.shape)
                                                      .set(0, {{sample.batch, sample.batch + 1}})
                                                      .set(1, single_rows(sample.rows))
                                                      .set(2, {{sample.head, sample.head + 1}}));
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (std::isnan(found[i]) && std::isnan(expected[i])) continue;
    const double apart = found[i] == expected[i] ? 0.0 : found[i] - expected[i];
    sums_.differences[gradient] += apart * apart;
    const double terms = with_larger_delta[i] - expected[i];
    if (std::isfinite(expected[i])) sums_.expected[gradient] += expected[i] * expected[i];
    if (std::isfinite(terms)) sums_.terms[gradient] += terms * terms;
  }
  sums_.elements[gradient] += static_cast<double>(found.size());
  sums_.rows[gradient] += static_cast<double>(sample.rows.size());
}

Sums sum_of_all(Communicator& ranks, const Sums& mine) {
  std::vector<Sums> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  Sums sum;
  for (const Sums& one : all) {
    for (std::size_t i = 0; i < 3; ++i) {
      sum.differences[i] += one.differences[i];
      sum.expected[i] += one.expected[i];
      sum.terms[i] += one.terms[i];
      sum.elements[i] += one.elements[i];
      sum.rows[i] += one.rows[i];
    }
  }
  return sum;
}

/// A rounding of O moves a gradient by half a unit of delta's terms at most, an eighth of the four
/// units that verify allows of a norm, which therefore counts as an eighth of theirs at least.
GradientErrors errors_of(const Sums& sums) {
  GradientErrors errors;
  for (std::size_t i = 0; i < 3; ++i) {
    errors.rows[i] = static_cast<std::int64_t>(sums.rows[i]);
    if (sums.elements[i] == 0.0) continue;
    const double apart = std::sqrt(sums.differences[i]);
    const double norm = std::max(std::sqrt(sums.expected[i]), std::sqrt(sums.terms[i]) / 8.0);
    errors.relative[i] = apart == 0.0 ? 0.0 : apart / norm;
    if (std::isnan(errors.relative[i])) {
      errors.relative[i] = std::numeric_limits<double>::infinity();
    }
  }
  return errors;
}

}  // namespace

GradientErrors compare_gradients(Communicator& ranks, Communicator& alone, const Hdf5File& output,
                                 const Checkpoint& input, const RunOptions& options,
                                 const MaskSlices& mask) {
  GradientCheck check(alone, output, input, options, mask);
  const auto shared_out = [&](const std::vector<RowSample>& samples, auto visit) {
    for (auto i = static_cast<std::size_t>(ranks.rank()); i < samples.size();
         i += static_cast<std::size_t>(ranks.size())) {
      visit(samples[i]);
    }
  };
  const Shape& queries = input.shape(CheckpointField::query);
  const Shape& keys = input.shape(CheckpointField::key);
  const auto dims = static_cast<double>(queries[3] + input.shape(CheckpointField::value)[3]);
  if (check.has(kQuery)) {
    const double row_work = 5.0 * static_cast<double>(keys[1]) * dims;
    shared_out(sample_rows(queries, {row_work, kWork, 64, kSeed}),
               [&](const RowSample& sample) { check.check_queries(sample); });
  }
  if (check.has(kKey) || check.has(kValue)) {
    const double row_work = 4.0 * static_cast<double>(queries[1] * (queries[2] / keys[2])) * dims;
    shared_out(sample_rows(keys, {row_work, kWork, kMostKeyHeads, kSeed}),
               [&](const RowSample& sample) { check.check_keys(sample); });
  }
  return errors_of(sum_of_all(ranks, check.sums()));
}

}  // namespace annulus::launch
