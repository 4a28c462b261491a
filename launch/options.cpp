#include "launch/options.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <sstream>
#include <vector>

#include "kernels/error.hpp"
#include "launch/number_option.hpp"
#include "launch/parse.hpp"
#include "runtime/watchdog.hpp"

namespace annulus::launch {
namespace {

void bind_dataset(CLI::App& app, RunOptions& options, CheckpointField field,
                  const std::string& flag, const std::string& about) {
  app.add_option(flag, options.input.dataset(field), about);
}

void bind_dtype(CLI::App& app, std::optional<DType>& dtype, const std::string& flag,
                const std::string& about) {
  app.add_option_function<std::string>(
         flag, [&dtype](const std::string& text) { dtype = parse_dtype(text); }, about)
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
}

void bind_input(CLI::App& app, RunOptions& options) {
  app.add_option("--op", options.operation, "operation, see `annulus ops`; auto: the cheapest")
      ->required();
  app.add_option("--mesh", options.mesh,
                 "axis sizes such as sp=4,tp=2; one may be -1; the product is the ranks");
  app.add_option("--input", options.input.path, "HDF5 file of the tensors")->required();
  bind_dataset(app, options, CheckpointField::query, "--query", "dataset");
  bind_dataset(app, options, CheckpointField::key, "--key", "dataset");
  bind_dataset(app, options, CheckpointField::value, "--value", "dataset");
  app.add_option_function<std::string>(
         "--input-layout",
         [&options](const std::string& text) {
           options.input.layout = text == "bhtd" ? InputLayout::bhtd : InputLayout::bthd;
         },
         "order of the datasets' dimensions, default bthd")
      ->check(CLI::IsMember({"bthd", "bhtd"}));
  app.add_option("--output", options.output, "HDF5 file to write; none: nothing is written");
  app.add_flag("--force", options.force, "replace an output that exists");
}

void bind_mask(CLI::App& app, RunOptions& options) {
  app.add_flag_function(
         "--causal,!--no-causal", [&options](std::int64_t count) { options.causal = count > 0; },
         "keys up to the query, aligned at the end where lengths differ; default: the operation's "
         "own")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("--window", options.window,
                 "keys from L before to R after the query, -1: unbounded")
      ->delimiter(',')
      ->type_name("L,R")
      ->check(whole_number<std::int64_t>(-1, std::numeric_limits<std::int64_t>::max(),
                                         "a side of L,R, each -1 or more"));
  bind_dataset(app, options, CheckpointField::documents, "--documents",
               "dataset, int [B,T], -1 is padding");
  bind_dataset(app, options, CheckpointField::cu_seqlens, "--cu-seqlens", "dataset, int offsets");
  bind_dataset(app, options, CheckpointField::mask, "--mask", "dataset, bool [B,H|1,Tq,Tk]");
  bind_dataset(app, options, CheckpointField::bias, "--bias", "dataset, float [B,H|1,Tq,Tk]");
  bind_dataset(app, options, CheckpointField::sinks, "--sinks", "dataset, float [H]");
}

void bind_mathematics(CLI::App& app, RunOptions& options) {
  app.add_option("--soft-cap", options.soft_cap, "logits become cap·tanh(logit/cap); 0: none")
      ->check(number_where<float>([](float x) { return x >= 0.0F && std::isfinite(x); },
                                  "0 or more and finite"));
  app.add_option("--scale", options.scale, "of the logits, default head_dim^-0.5")
      ->check(number_where<float>([](float x) { return std::isfinite(x); }, "finite"));
  app.add_option("--dropout", options.dropout, "probability")
      ->check(number_where<float>([](float x) { return x >= 0.0F && x < 1.0F; }, "in [0, 1)"));
  app.add_option("--seed", options.seed, "of the dropout")->check(whole_number<std::uint64_t>(0));
  bind_dtype(app, options.dtype, "--dtype", "of the computation, default the input's");
  bind_dtype(app, options.output_dtype, "--output-dtype", "default the input's");
  app.add_flag("--backward", options.backward, "also writes the gradients, from --grad-output");
  bind_dataset(app, options, CheckpointField::grad_output, "--grad-output",
               "dataset, as the output");
  app.add_flag("--weights", options.weights, "also writes the attention weights (vanilla)");
}

void bind_execution(CLI::App& app, RunOptions& options) {
  app.add_option("--layout", options.layout, "how the sequence is dealt to the ranks")
      ->check(CLI::IsMember({"contiguous", "zigzag", "balanced"}));
  app.add_option("--backend", options.backend, "default: cuda where every rank has a device")
      ->check(CLI::IsMember({"cpu", "cuda", "cudnn"}));
  app.add_option("--transport", options.transport, "between the ranks")
      ->check(CLI::IsMember({"auto", "mpi", "nccl", "peer"}));
  app.add_flag("--reproducible", options.reproducible, "the same bits for any number of ranks");
  app.add_flag("--check-finite", options.check_finite, "refuse NaN and Inf in inputs and results");
  app.add_option("--timeout", options.timeout_seconds, "seconds without progress before the end")
      ->check(
          number_where<double>([](double x) { return x > 0.0 && x <= Watchdog::kLongestTimeout; },
                               fmt::format("above 0 and at most {}", Watchdog::kLongestTimeout)));
  app.add_option("--rates", options.rates,
                 "for --op auto: measured rates, of `bench ring --rates-out`");
  app.add_option("--trace", options.trace, "write a trace of the stages (JSON)");
  app.add_flag("--json", options.json, "report for machines");
}

void bind(CLI::App& app, RunOptions& options) {
  app.option_defaults()->always_capture_default();
  bind_input(app, options);
  bind_mask(app, options);
  bind_mathematics(app, options);
  bind_execution(app, options);
  app.set_config("--config", "", "file of options, one `name = value` a line");
  app.allow_config_extras(false);
}

}  // namespace

std::optional<RunOptions> parse_run_options(Arguments arguments) {
  RunOptions options;
  CLI::App app("Attention over the tensors of an HDF5 file.", "annulus run");
  bind(app, options);
  if (!parse(app, arguments)) return std::nullopt;
  options.text = app.config_to_str();
  return options;
}

RunOptions restore_run_options(std::string_view text) {
  RunOptions options;
  CLI::App app("", "options of the run");
  bind(app, options);
  std::istringstream stream{std::string(text)};
  try {
    app.parse_from_stream(stream);
  } catch (const CLI::Error& error) {
    throw Error(ExitCode::bad_data,
                fmt::format("the options kept in the output cannot be read: {}", error.what()));
  }
  options.text = text;
  return options;
}

std::optional<VerifyOptions> parse_verify_options(Arguments arguments) {
  VerifyOptions options;
  CLI::App app("Recomputes rows of an output in double and prints the errors.", "annulus verify");
  app.add_option("OUT", options.output, "file that `annulus run` wrote")->required();
  app.add_option("--input", options.input, "file that it read")->required();
  app.add_flag("--json", options.json, "report for machines");
  if (!parse(app, arguments)) return std::nullopt;
  return options;
}

}  // namespace annulus::launch
