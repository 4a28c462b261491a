#include "launch/bench_ring_options.hpp"

#include <CLI/CLI.hpp>

#include "launch/number_option.hpp"
#include "launch/parse.hpp"

namespace annulus::launch {

std::optional<RingOptions> parse_ring_options(Arguments arguments) {
  RingOptions options;
  options.plan.operation = "ring";
  options.plan.seq_q = 8192;
  options.plan.heads = "8:8";
  options.plan.dtype = "f32";
  options.plan.layout = "zigzag";
  options.plan.rates = "cpu";
  CLI::App app("An attention over the ranks started, beside its kernels and its plan.",
               "annulus bench ring");
  app.option_defaults()->always_capture_default();
  app.add_option("--op", options.plan.operation,
                 "ring, all_gather, ulysses, hybrid or auto: by the rates measured");
  app.add_option("--seq", options.plan.seq_q, "tokens")->check(whole_number<>(1));
  app.add_option("--batch", options.plan.batch, "batch rows")->check(whole_number<>(1));
  app.add_option("--heads", options.plan.heads, "query heads, or query:KV heads");
  app.add_option("--head-dim", options.plan.head_dim, "elements of a head")
      ->check(whole_number<>(1));
  app.add_option("--dtype", options.plan.dtype, "of the tensors")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_option("--mask", options.plan.mask, "as in annulus plan");
  const CLI::Option* const layout =
      app.add_option("--layout", options.plan.layout, "how rows are dealt; --op auto: balanced")
          ->check(CLI::IsMember({"contiguous", "zigzag", "balanced"}));
  app.add_flag_callback(
      "--messages", [&options] { options.in_place = false; },
      "send rows instead of reading them in place");
  app.add_option("--backend", options.backend, "default: cuda where every rank has a device")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--transport", options.transport, "between devices")
      ->check(CLI::IsMember({"auto", "mpi", "nccl", "peer"}));
  app.add_flag_callback(
      "--stages", [&options] { options.one_launch = false; },
      "on devices, a launch a stage instead of one");
  app.add_flag("--reproducible", options.plan.reproducible, "the same bits for any ranks");
  app.add_option("--repeats", options.repeats, "the fastest counts")->check(whole_number<int>(1));
  app.add_option("--node-ranks", options.node_ranks, "hybrid: ranks that exchange heads")
      ->check(whole_number<int>(1));
  app.add_flag("--memory", options.memory,
               "print the peak of memory in all repeats beside the planned one only");
  app.add_option("--trace", options.trace, "write what the last run of each pass did, as run does");
  app.add_option("--rates-out", options.rates_out, "write the measured rates for annulus plan");
  app.add_flag("--json", options.plan.json, "print for machines");
  if (!parse(app, arguments)) return std::nullopt;
  // As in annulus plan: a zigzag cuts a window in two places.
  if (options.plan.operation == "auto" && layout->count() == 0) options.plan.layout = "balanced";
  return options;
}

}  // namespace annulus::launch
