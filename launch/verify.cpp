#include "launch/verify.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "kernels/error.hpp"
#include "launch/mask_input.hpp"
#include "launch/options.hpp"
#include "launch/parse.hpp"
#include "launch/report.hpp"
#include "launch/sampled_rows.hpp"
#include "launch/verify_gradients.hpp"
#include "runtime/checkpoint.hpp"
#include "runtime/context.hpp"
#include "runtime/hdf5_file.hpp"

namespace annulus::launch {
namespace {

constexpr const char* kOutputs = "output/attention_outputs";
constexpr const char* kLogSumExp = "output/log_sum_exp";
// Products of the double loops that all ranks share: about a second of one core.
constexpr double kWork = 1.3e9;
constexpr std::uint64_t kSeed = 20240229;
constexpr std::int64_t kRowsAtOnce = 512;

/// Largest differences, and how much was compared.
struct Errors {
  double outputs = 0.0;
  double log_sum_exp = 0.0;
  double stored = -1.0;    // -1: no stored reference
  double reference = 0.0;  // of the stored reference itself, to the recomputed rows
  double largest = 0.0;    // of the recomputed outputs
  double logit = 0.0;      // the largest logarithm of a sum, by magnitude
  double product = 0.0;    // what no logit exceeds: scale · |q| · |k|
  double rows = 0.0;
  double not_finite = 0.0;  // rows, as recomputed
};

/// The difference, infinite unless both are finite or the same.
double difference(double a, double b) {
  if (a == b || (std::isnan(a) && std::isnan(b))) return 0.0;
  const double apart = std::abs(a - b);
  return std::isnan(apart) ? std::numeric_limits<double>::infinity() : apart;
}

std::vector<double> read_doubles(const Hdf5File& file, const DatasetInfo& dataset,
                                 const Selection& selection) {
  std::vector<double> values(static_cast<std::size_t>(selection.shape().elements()));
  file.read(dataset, selection, {values.data(), DType::f64, selection.shape()});
  return values;
}

/// An output, the input it came from and how it was made.
struct Subject {
  Hdf5File output;
  RunOptions options;
  Report report;
  DatasetInfo outputs;
  std::optional<DatasetInfo> log_sum_exp;
};

std::string kept_attribute(const Hdf5File& file, const std::string& name) {
  const std::optional<std::string> text = file.text_attribute("output", name);
  require(text.has_value(), ExitCode::bad_data,
          "verify: {}: no attribute \"{}\" on /output; expected a file that annulus run wrote",
          file.path(), name);
  return *text;
}

Subject open_subject(const VerifyOptions& options) {
  Hdf5File file(options.output,
                {{kOutputs, kLogSumExp}, {{"output", "options"}, {"output", "report"}}, true});
  DatasetInfo outputs = file.describe(kOutputs);
  RunOptions run = restore_run_options(kept_attribute(file, "options"));
  run.input.path = options.input;
  Report report = report_from_text(kept_attribute(file, "report"));
  std::optional<DatasetInfo> log_sum_exp;
  const std::vector<std::string> paths = file.dataset_paths();
  if (std::find(paths.begin(), paths.end(), kLogSumExp) != paths.end()) {
    log_sum_exp = file.describe(kLogSumExp);
  }
  return {std::move(file), std::move(run), std::move(report), std::move(outputs), log_sum_exp};
}

void require_same_shape(const Subject& subject, const Checkpoint& input) {
  const Shape& query = input.shape(CheckpointField::query);
  const Shape expected{query[0], query[1], query[2], input.shape(CheckpointField::value)[3]};
  require(subject.outputs.shape == expected, ExitCode::bad_data,
          "verify: {}: {} has shape {}, the input {} leads to {}", subject.output.path(), kOutputs,
          subject.outputs.shape.to_string(), input.file().path(), expected.to_string());
}

/// The dataset attention_outputs in the queries' group, when it has the output's shape.
std::optional<DatasetInfo> stored_reference(const Subject& subject, const Checkpoint& input) {
  const std::string& query = input.dataset(CheckpointField::query).path;
  const auto slash = query.rfind('/');
  const std::string path =
      (slash == std::string::npos ? "" : query.substr(0, slash + 1)) + "attention_outputs";
  const std::vector<std::string> paths = input.file().dataset_paths();
  if (std::find(paths.begin(), paths.end(), path) == paths.end()) return std::nullopt;
  const DatasetInfo info = input.file().describe(path);
  if (info.shape != subject.outputs.shape) return std::nullopt;
  return info;
}

double largest_norm(const ConstTensorView& rows) {
  const auto* values = static_cast<const double*>(rows.data);
  const std::int64_t dim = rows.shape[3];
  double largest = 0.0;
  for (std::int64_t row = 0; row < rows.shape[1]; ++row) {
    const double* of_row = values + row * dim;
    largest = std::max(largest, std::inner_product(of_row, of_row + dim, of_row, 0.0));
  }
  return std::sqrt(largest);
}

double largest_product(const AttentionProblem& head) {
  const double product = std::abs(head.scale) * largest_norm(head.q) * largest_norm(head.k);
  return std::isfinite(product) ? product : 0.0;
}

void compare_rows(const Subject& subject, const Checkpoint& input, const RowSample& sample,
                  const DoubleRows& expected, Errors& errors) {
  std::vector<Span> rows;
  for (const std::int64_t row : sample.rows) rows.push_back({row, row + 1});
  const Span batch{sample.batch, sample.batch + 1};
  const Span head{sample.head, sample.head + 1};
  const Selection part =
      Selection(subject.outputs.shape).set(0, {batch}).set(1, rows).set(2, {head});
  const std::vector<double> found = read_doubles(subject.output, subject.outputs, part);
  const std::size_t columns = found.size() / std::max<std::size_t>(rows.size(), 1);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    bool finite = true;
    for (std::size_t i = row * columns; i < (row + 1) * columns; ++i) {
      errors.outputs = std::max(errors.outputs, difference(found[i], expected.outputs[i]));
      if (std::isfinite(expected.outputs[i])) {
        errors.largest = std::max(errors.largest, std::abs(expected.outputs[i]));
      } else {
        finite = false;
      }
    }
    if (!finite) ++errors.not_finite;
    if (std::isfinite(expected.log_sum_exp[row])) {
      errors.logit = std::max(errors.logit, std::abs(expected.log_sum_exp[row]));
    }
  }
  errors.rows += static_cast<double>(rows.size());
  if (const std::optional<DatasetInfo> reference = stored_reference(subject, input)) {
    const std::vector<double> stored = read_doubles(input.file(), *reference, part);
    for (std::size_t i = 0; i < stored.size(); ++i) {
      errors.reference = std::max(errors.reference, difference(stored[i], expected.outputs[i]));
    }
  }
  if (!subject.log_sum_exp) return;
  const std::vector<double> lse = read_doubles(
      subject.output, *subject.log_sum_exp,
      Selection(subject.log_sum_exp->shape).set(0, {batch}).set(1, {head}).set(2, rows));
  for (std::size_t i = 0; i < lse.size(); ++i) {
    errors.log_sum_exp = std::max(errors.log_sum_exp, difference(lse[i], expected.log_sum_exp[i]));
  }
}

void compare_stored(const Subject& subject, const Checkpoint& input, const Communicator& ranks,
                    Errors& errors) {
  const std::optional<DatasetInfo> reference = stored_reference(subject, input);
  if (!reference) return;
  errors.stored = 0.0;
  const Shape& shape = reference->shape;
  for (std::int64_t begin = kRowsAtOnce * ranks.rank(); begin < shape[1];
       begin += kRowsAtOnce * ranks.size()) {
    const Selection rows =
        Selection(shape).set(1, {{begin, std::min(begin + kRowsAtOnce, shape[1])}});
    const std::vector<double> expected = read_doubles(input.file(), *reference, rows);
    const std::vector<double> found = read_doubles(subject.output, subject.outputs, rows);
    for (std::size_t i = 0; i < found.size(); ++i) {
      errors.stored = std::max(errors.stored, difference(found[i], expected[i]));
    }
  }
}

Errors worst_of_all(Communicator& ranks, const Errors& mine) {
  std::vector<Errors> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  Errors worst;
  for (const Errors& one : all) {
    worst = {std::max(worst.outputs, one.outputs), std::max(worst.log_sum_exp, one.log_sum_exp),
             std::max(worst.stored, one.stored),   std::max(worst.reference, one.reference),
             std::max(worst.largest, one.largest), std::max(worst.logit, one.logit),
             std::max(worst.product, one.product), worst.rows + one.rows,
             worst.not_finite + one.not_finite};
  }
  return worst;
}

/// A few roundings of the 16-bit type that is anywhere, relative to what is rounded: inputs and
/// outputs are rounded to it, and so may the weights be.
double few_roundings(const Subject& subject, const Checkpoint& input) {
  double epsilon = 0.0;
  for (const DType dtype : {subject.outputs.type.dtype, input.dtype(CheckpointField::query),
                            subject.options.dtype.value_or(DType::f32)}) {
    if (dtype == DType::f16) epsilon = std::max(epsilon, 0x1p-11);
    if (dtype == DType::bf16) epsilon = std::max(epsilon, 0x1p-8);
  }
  return 4.0 * epsilon;
}

/// What fp32 arithmetic stays within, and a 16-bit type adds to: of an output, and of a gradient
/// relative to its norm. Weights are as exact as logits, which beyond 64 lose in proportion: 2e-5
/// are five roundings there. A logit's own sum of products wanders by a rounding of scale · |q| ·
/// |k| (Higham and Mary, SIAM J. Sci. Comput. 41, 2019); the worst of many by four.
struct Allowed {
  double output = 2e-5;
  double gradient = 1e-4;
};

Allowed allowed_errors(const Subject& subject, const Checkpoint& input, const Errors& errors) {
  const double more = few_roundings(subject, input);
  const double of_products = 4.0 * 0x1p-24 * errors.product / 2e-5;
  const double of_logits = std::max({errors.logit / 64.0, of_products, 1.0});
  return {2e-5 * of_logits + more * errors.largest, 1e-4 * of_logits + more};
}

double worst_of(const GradientErrors& gradients) {
  return *std::max_element(gradients.relative.begin(), gradients.relative.end());
}

void print_table(const Subject& subject, const Checkpoint& input, const Errors& errors,
                 const GradientErrors& gradients, const Allowed& allowed) {
  const Report& report = subject.report;
  const auto line = [](const std::string& what, const std::string& value) {
    fmt::print("{:<18} {}\n", what, value);
  };
  const bool causal = subject.options.causal.value_or(false);
  const Shape& query = input.shape(CheckpointField::query);
  line("operation", report.operation + ", " + describe_mask(subject.options, causal));
  line("ranks", std::to_string(report.ranks));
  line("mesh", report.mesh);
  line("query", fmt::format("{} {}", query.to_string(), name(input.dtype(CheckpointField::query))));
  line("key", input.shape(CheckpointField::key).to_string());
  line("value", input.shape(CheckpointField::value).to_string());
  line("time", format_seconds(report.seconds));
  line("rows in double", fmt::format("{:.0f} of {}", errors.rows, query[0] * query[1] * query[2]));
  if (errors.not_finite > 0.0) {
    line("not finite", fmt::format("{:.0f} of these rows", errors.not_finite));
  }
  line("max error", fmt::format("{:.2e}", errors.outputs));
  if (subject.log_sum_exp) line("max error of LSE", fmt::format("{:.2e}", errors.log_sum_exp));
  if (errors.stored >= 0.0) line("to the reference", fmt::format("{:.2e}", errors.stored));
  line("allowed", fmt::format("{:.2e}", allowed.output));
  if (worst_of(gradients) < 0.0) return;
  for (std::size_t i = 0; i < gradients.relative.size(); ++i) {
    if (gradients.relative[i] < 0.0) continue;
    line(fmt::format("grad_{}", GradientErrors::kNames[i]),
         fmt::format("{:.2e} of its norm, in {} rows", gradients.relative[i], gradients.rows[i]));
  }
  line("allowed", fmt::format("{:.2e}", allowed.gradient));
}

void print_json(const Subject& subject, const Errors& errors, const GradientErrors& gradients,
                const Allowed& allowed) {
  nlohmann::json json = to_json(subject.report);
  json["max_error"] = errors.outputs;
  if (subject.log_sum_exp) json["max_error_log_sum_exp"] = errors.log_sum_exp;
  if (errors.stored >= 0.0) json["max_error_stored_reference"] = errors.stored;
  json["rows"] = static_cast<std::int64_t>(errors.rows);
  json["rows_not_finite"] = static_cast<std::int64_t>(errors.not_finite);
  json["tolerance"] = allowed.output;
  for (std::size_t i = 0; i < gradients.relative.size(); ++i) {
    if (gradients.relative[i] < 0.0) continue;
    const std::string name = fmt::format("grad_{}", GradientErrors::kNames[i]);
    json["relative_error_" + name] = gradients.relative[i];
    json["rows_" + name] = gradients.rows[i];
    json["tolerance_gradients"] = allowed.gradient;
  }
  fmt::print("{}\n", json.dump());
}

}  // namespace

void verify_output(Arguments arguments) {
  const std::optional<VerifyOptions> options = parse_verify_options(arguments);
  if (!options) return;
  Context context;
  Communicator& ranks = context.world();
  const std::unique_ptr<Communicator> alone = ranks.split(ranks.rank(), 0);
  const Subject subject = open_subject(*options);
  const Checkpoint input(*alone, subject.options.input);
  require_same_shape(subject, input);

  const Shape& query = input.shape(CheckpointField::query);
  const std::int64_t seq_kv = input.shape(CheckpointField::key)[1];
  const MaskSlices mask =
      make_slices(read_mask(*alone, input, subject.options, subject.options.causal.value_or(false)),
                  query[0], query[1], seq_kv);
  const double row_work =
      static_cast<double>(seq_kv * (query[3] + input.shape(CheckpointField::value)[3]));
  const std::vector<RowSample> samples = sample_rows(query, {row_work, kWork, 64, kSeed});
  Errors errors;
  for (std::size_t i = static_cast<std::size_t>(ranks.rank()); i < samples.size();
       i += static_cast<std::size_t>(ranks.size())) {
    const CutAttention cut(*alone, input, subject.options, mask, row_cut(input, samples[i]));
    compare_rows(subject, input, samples[i], recompute(cut), errors);
    errors.product = std::max(errors.product, largest_product(cut.problem()));
  }
  compare_stored(subject, input, ranks, errors);
  errors = worst_of_all(ranks, errors);

  const GradientErrors gradients =
      compare_gradients(ranks, *alone, subject.output, input, subject.options, mask);

  const Allowed allowed = allowed_errors(subject, input, errors);
  // A reference of another mask says nothing about this output.
  if (errors.reference > allowed.output) errors.stored = -1.0;
  if (ranks.rank() == 0 && options->json) print_json(subject, errors, gradients, allowed);
  if (ranks.rank() == 0 && !options->json) print_table(subject, input, errors, gradients, allowed);
  // The logarithm of a sum is as exact as the logits, which the products' rounding limits.
  const double found = std::max({errors.outputs, errors.log_sum_exp, errors.stored});
  require(found <= allowed.output, ExitCode::bad_data,
          "verify: {}: error {:.2e}, at most {:.2e} expected", options->output, found,
          allowed.output);
  require(worst_of(gradients) <= allowed.gradient, ExitCode::bad_data,
          "verify: {}: gradients are {:.2e} of their norm apart, at most {:.2e} expected",
          options->output, worst_of(gradients), allowed.gradient);
}

}  // namespace annulus::launch
