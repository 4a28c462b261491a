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
  std::array<double, 3> elements{};
  std::array<double, 3> rows{};
};

std::size_t elements(std::int64_t rows, std::int64_t dim) {
  return static_cast<std::size_t>(rows * dim);
}

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
  void add_keys(const AttentionCut& cut, std::vector<double>& grad_k, std::vector<double>& grad_v);
  void compare(Gradient gradient, const RowSample& sample, const std::vector<double>& expected);

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
  compare(kQuery, sample, grad_q);
}

void GradientCheck::add_keys(const AttentionCut& part, std::vector<double>& grad_k,
                             std::vector<double>& grad_v) {
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
  call.grad_k = {grad_k.data(), DType::f64, call.problem.k.shape};
  call.grad_v = {grad_v.data(), DType::f64, call.problem.v.shape};
  kernels::reference::backward(call);
}

void GradientCheck::check_keys(const RowSample& sample) {
  const Shape& queries = input_.shape(CheckpointField::query);
  const Shape& keys = input_.shape(CheckpointField::key);
  const std::int64_t group = queries[2] / keys[2];
  const auto rows = static_cast<std::int64_t>(sample.rows.size());
  std::vector<double> grad_k(elements(rows, keys[3]));
  std::vector<double> grad_v(elements(rows, input_.shape(CheckpointField::value)[3]));
  for (std::int64_t q_head = sample.head * group; q_head < (sample.head + 1) * group; ++q_head) {
    for (std::int64_t begin = 0; begin < queries[1]; begin += kQueriesAtOnce) {
      const Span part{begin, std::min(begin + kQueriesAtOnce, queries[1])};
      add_keys({sample.batch, q_head, {part}, single_rows(sample.rows)}, grad_k, grad_v);
    }
  }
  if (has(kKey)) compare(kKey, sample, grad_k);
  if (has(kValue)) compare(kValue, sample, grad_v);
}

void GradientCheck::compare(Gradient gradient, const RowSample& sample,
                            const std::vector<double>& expected) {
  const DatasetInfo& dataset = *stored_[gradient];
  const std::vector<double> found = read(dataset, Selection(dataset.shape)
                                                      .set(0, {{sample.batch, sample.batch + 1}})
                                                      .set(1, single_rows(sample.rows))
                                                      .set(2, {{sample.head, sample.head + 1}}));
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (std::isnan(found[i]) && std::isnan(expected[i])) continue;
    const double apart = found[i] == expected[i] ? 0.0 : found[i] - expected[i];
    sums_.differences[gradient] += apart * apart;
    if (std::isfinite(expected[i])) sums_.expected[gradient] += expected[i] * expected[i];
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
      sum.elements[i] += one.elements[i];
      sum.rows[i] += one.rows[i];
    }
  }
  return sum;
}

/// Gradients that cancel out, of rows with a single key say, are rounding errors of the others'
/// size, so a norm counts as a hundredth of the largest at least.
GradientErrors errors_of(const Sums& sums) {
  const auto mean = [&](const std::array<double, 3>& squares, std::size_t i) {
    return std::sqrt(squares[i] / std::max(sums.elements[i], 1.0));
  };
  double largest = 0.0;
  for (std::size_t i = 0; i < 3; ++i) largest = std::max(largest, mean(sums.expected, i));
  GradientErrors errors;
  for (std::size_t i = 0; i < 3; ++i) {
    errors.rows[i] = static_cast<std::int64_t>(sums.rows[i]);
    if (sums.elements[i] == 0.0) continue;
    const double apart = mean(sums.differences, i);
    const double norm = std::max(mean(sums.expected, i), 0.01 * largest);
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
    const double row_work = 3.0 * static_cast<double>(keys[1]) * dims;
    shared_out(sample_rows(queries, {row_work, kWork, 64, kSeed}),
               [&](const RowSample& sample) { check.check_queries(sample); });
  }
  if (check.has(kKey) || check.has(kValue)) {
    const double row_work = 2.0 * static_cast<double>(queries[1] * (queries[2] / keys[2])) * dims;
    shared_out(sample_rows(keys, {row_work, kWork, kMostKeyHeads, kSeed}),
               [&](const RowSample& sample) { check.check_keys(sample); });
  }
  return errors_of(sum_of_all(ranks, check.sums()));
}

}  // namespace annulus::launch
