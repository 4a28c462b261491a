#include "launch/run.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/error.hpp"
#include "launch/check_finite.hpp"
#include "launch/destinations.hpp"
#include "launch/input_digest.hpp"
#include "launch/mask_input.hpp"
#include "launch/options.hpp"
#include "launch/progress.hpp"
#include "launch/report.hpp"
#include "launch/run_input.hpp"
#include "launch/run_output.hpp"
#include "runtime/agreement.hpp"
#include "runtime/checkpoint.hpp"
#include "runtime/checkpoint_output.hpp"
#include "runtime/context.hpp"
#include "runtime/default_backend.hpp"
#include "runtime/operation_log.hpp"
#include "runtime/operation_registry.hpp"
#include "runtime/statement.hpp"
#include "runtime/stopwatch.hpp"
#include "runtime/text_file.hpp"
#include "runtime/trace.hpp"
#include "runtime/watchdog.hpp"
#include "sharding/mesh.hpp"

namespace annulus::launch {
namespace {

using Clock = std::chrono::steady_clock;

// Without a mesh all ranks share the sequence.
Mesh mesh_of(const RunOptions& options, int ranks) {
  return Mesh::parse(options.mesh.empty() ? "sp=-1" : options.mesh, ranks);
}

// The input's float type, unless asked otherwise; only the reference computes in double.
DType runtime_dtype(const RunOptions& options, const Checkpoint& checkpoint) {
  const DType stored = checkpoint.dtype(CheckpointField::query);
  return options.dtype.value_or(stored == DType::f64 ? DType::f32 : stored);
}

BackendNeeds needs_of(const RunOptions& options, DType dtype, const AttentionShape& shape) {
  return {.dtype = dtype,
          .shape = shape,
          .scale = options.scale.value_or(1.0F),
          .soft_cap = options.soft_cap,
          .dropout = options.dropout,
          .backward = options.backward,
          .weights = options.weights,
          .reproducible = options.reproducible};
}

std::unique_ptr<OperationImpl> make_operation(Context& context, const RunOptions& options,
                                              DType dtype, const AttentionShape& shape) {
  OperationConfig config;
  config.mesh = mesh_of(options, context.size());
  config.runtime_dtype = dtype;
  config.backend = options.backend.empty()
                       ? default_backend(context, needs_of(options, dtype, shape))
                       : options.backend;
  config.transport = parse_transport(options.transport);
  config.softmax_scale = options.scale;
  config.dropout_prob = options.dropout;
  if (!options.rates.empty()) {
    OperationTuning tuning;
    tuning.rates = options.rates;
    config.operation_configs = {{options.operation, tuning}};
  }
  return OperationRegistry::create(options.operation, resolve_metadata(context, config));
}

SequenceDeal deal_of(const std::string& layout) {
  if (layout == "zigzag") return SequenceDeal::zigzag;
  return layout == "balanced" ? SequenceDeal::balanced : SequenceDeal::contiguous;
}

AttentionOptions attention_options(Context& context, const RunOptions& options,
                                   const Checkpoint& checkpoint, bool causal) {
  AttentionOptions attention;
  attention.causal = causal;
  attention.mask = read_mask(context.world(), checkpoint, options, causal);
  attention.scale = options.scale;
  attention.soft_cap = options.soft_cap;
  attention.dropout = options.dropout;
  attention.seed = options.seed;
  attention.deal = deal_of(options.layout);
  attention.output_dtype = options.output_dtype;
  attention.attention_weights = options.weights;
  attention.reproducible = options.reproducible;
  return attention;
}

struct RankFigures {
  double seconds = 0.0;
  double compute = 0.0;
  double exposed = 0.0;
  double bytes = 0.0;
  double bytes_in_place = 0.0;
};

// Figures of one step over all ranks. Collective.
Report make_report(Context& context, const RunOptions& options, const Mesh& mesh,
                   const AttentionShape& shape, const OperationReport& mine, double seconds) {
  const RankFigures figures{seconds, mine.compute_seconds, mine.exposed_communication_seconds,
                            static_cast<double>(mine.bytes_sent),
                            static_cast<double>(mine.bytes_in_place)};
  std::vector<RankFigures> all(static_cast<std::size_t>(context.size()));
  context.world().all_gather(std::as_bytes(std::span(&figures, 1)),
                             std::as_writable_bytes(std::span(all)));
  Report report;
  report.operation = options.operation;
  report.mesh = mesh.to_string();
  report.ranks = context.size();
  const auto ranks = static_cast<double>(context.size());
  for (const RankFigures& rank : all) {
    report.seconds = std::max(report.seconds, rank.seconds);
    report.compute_seconds += rank.compute / ranks;
    report.exposed_communication_seconds += rank.exposed / ranks;
    report.bytes_sent += static_cast<std::int64_t>(rank.bytes);
    report.bytes_in_place += static_cast<std::int64_t>(rank.bytes_in_place);
  }
  report.imbalance = mine.imbalance;
  // A pair costs a product and a sum in each dimension of keys and of values.
  const double flops = mine.pairs * 2.0 * static_cast<double>(shape.head_dim + shape.value_dim);
  report.tflops = flops / report.seconds / 1e12;
  return report;
}

void check_finite_input(Context& context, const RunInput& input) {
  check_finite(context, "query", input.query);
  check_finite(context, "key", input.key);
  check_finite(context, "value", input.value);
  if (input.sinks) check_finite(context, "sinks", *input.sinks, true);
  if (input.bias) check_finite(context, "bias", *input.bias, true);
}

void check_finite_output(Context& context, const OperationOutput& output,
                         const OperationGradients& gradients) {
  check_finite(context, "attention_outputs", output.attention_outputs);
  check_finite(context, "log_sum_exp", output.log_sum_exp, true);
  check_finite(context, "grad_query", gradients.query);
  check_finite(context, "grad_key", gradients.key);
  check_finite(context, "grad_value", gradients.value);
}

OperationReport sum_of(const OperationReport& forward, const OperationReport& backward) {
  OperationReport sum = forward;
  sum.compute_seconds += backward.compute_seconds;
  sum.exposed_communication_seconds += backward.exposed_communication_seconds;
  sum.bytes_sent += backward.bytes_sent;
  sum.bytes_in_place += backward.bytes_in_place;
  return sum;
}

// Ranks that were given different options are refused before they do anything different. Paths and
// what only rank 0 prints may differ.
void agree_on_options(Context& context, const RunOptions& options) {
  static const std::set<std::string> own = {"input", "output", "config", "json"};
  Statement statement("run");
  std::istringstream lines(options.text);
  for (std::string line; std::getline(lines, line);) {
    const auto equals = line.find('=');
    const std::string name = line.substr(0, equals);
    if (equals == std::string::npos || own.contains(name)) continue;
    statement.add(name, std::string_view(line).substr(equals + 1));
  }
  static_cast<void>(statement.agree(context.world()));
}

// Before anything is computed, what could not be written in the end is refused, and what would take
// the place of an input.
void check_destinations(Context& context, const RunOptions& options) {
  agree(context.world(), [&] {
    if (context.rank() != 0) return;
    require_distinct_files("annulus run",
                           {{"--output", options.output}, {"--trace", options.trace}},
                           {{"--input", options.input.path}, {"--rates", options.rates}});
    if (!options.trace.empty()) require_writable_text("trace", options.trace);
  });
  if (!options.output.empty()) {
    require_writable_output(context.world(), options.output, options.force);
  }
}

Report run(Context& context, const RunOptions& options) {
  agree_on_options(context, options);
  const ProgressBar progress(context.rank() == 0 && !options.json);
  const Mesh mesh = mesh_of(options, context.size());
  static_cast<void>(OperationRegistry::get(options.operation));  // refused before files are read
  check_destinations(context, options);
  operation_log().enter_phase("reading");
  const Checkpoint checkpoint(context.world(), options.input);
  const AttentionShape shape = attention_shape(checkpoint);
  const std::unique_ptr<OperationImpl> operation =
      make_operation(context, options, runtime_dtype(options, checkpoint), shape);
  const bool causal = options.causal.value_or(operation->causal_by_default());
  const AttentionOptions attention = attention_options(context, options, checkpoint, causal);
  const AttentionLayouts layouts = operation->layouts(shape, attention);
  const RunInput input =
      read_input(context, checkpoint, layouts, operation->metadata().runtime_dtype);
  if (options.check_finite) check_finite_input(context, input);
  if (!options.trace.empty()) start_trace();

  context.world().barrier();  // reading is not timed
  operation_log().enter_phase("computing");
  const Clock::time_point begin = Clock::now();
  const OperationOutput output = (*operation)(input.view(), attention);
  OperationGradients gradients;
  if (options.backward) {
    const DistributedTensor grad_output =
        read_field(context, checkpoint, CheckpointField::grad_output, layouts.output,
                   operation->metadata().runtime_dtype);
    gradients = operation->backward(input.view(), attention, output, grad_output);
  }
  const double seconds = seconds_since(begin);
  if (!options.trace.empty()) write_trace(context.world(), options.trace);
  if (options.check_finite) check_finite_output(context, output, gradients);

  Provenance provenance{
      causal, "",
      make_report(context, options, mesh, shape, sum_of(output.report, gradients.report), seconds)};
  provenance.report.backend = native_is_forced() ? "cpu" : operation->metadata().backend;
  if (!options.output.empty()) {
    operation_log().enter_phase("writing");
    provenance.input_digest = input_digest(context.world(), options.input.path);
    write_output(context, options, output, gradients, provenance);
  }
  operation_log().enter_phase("ending");
  return provenance.report;
}

}  // namespace

void run_attention(Arguments arguments) {
  const std::optional<RunOptions> options = parse_run_options(arguments);
  if (!options) return;
  require(options->backward == !options->input.dataset(CheckpointField::grad_output).empty(),
          ExitCode::usage, "annulus run: --backward and --grad-output go together");
  require(options->rates.empty() || options->operation == "auto", ExitCode::usage,
          "annulus run: --rates is what --op auto chooses by; --op {} does not choose",
          options->operation);
  Watchdog::of_process().start(options->timeout_seconds);
  Context context;
  const Report report = run(context, *options);
  if (context.rank() != 0) return;
  fmt::print("{}\n", options->json ? to_json(report).dump() : report_line(report));
}

}  // namespace annulus::launch
