#include "launch/bench_kernels.hpp"

#include <CLI/CLI.hpp>
#include <vector>

#include "kernels/error.hpp"
#include "launch/bench_cuda.hpp"
#include "launch/bench_row.hpp"
#include "launch/parse.hpp"

namespace annulus::launch {
namespace {

void check(const CudaBenchOptions& options) {
  for (const std::int64_t seq : options.seqs) {
    require(seq > 0 && options.tokens % seq == 0, ExitCode::usage,
            "bench kernels: --seq {} does not divide --tokens {}", seq, options.tokens);
  }
  for (const std::int64_t head_dim : options.head_dims) {
    require(head_dim > 0 && options.width % (head_dim * options.group) == 0, ExitCode::usage,
            "bench kernels: --width {} is no multiple of --head-dim {} times --group {}",
            options.width, head_dim, options.group);
  }
}

}  // namespace

void bench_kernels(Arguments arguments) {
  CudaBenchOptions options;
  std::string backend = "cuda";
  bool json = false;
  CLI::App app("Attention beside its ceiling and its peer, in turn in the same run.",
               "annulus bench kernels");
  app.add_option("--backend", backend, "where to compute")
      ->check(CLI::IsMember({"cuda"}))
      ->capture_default_str();
  app.add_option("--head-dim", options.head_dims, "head dimensions")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--seq", options.seqs, "tokens of a sequence")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--tokens", options.tokens, "tokens of a call; the batch is --tokens / --seq")
      ->capture_default_str();
  app.add_option("--width", options.width, "heads are --width / --head-dim")->capture_default_str();
  app.add_option("--group", options.group, "query heads of a KV head")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--dtype", options.dtype, "computation type")
      ->check(CLI::IsMember({"bf16", "f16"}))
      ->capture_default_str();
  app.add_option("--repeats", options.repeats, "timed runs; the median counts")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_flag("--json", json, "rows for machines");
  if (!parse(app, arguments)) return;
  check(options);
  print_rows(bench_cuda_kernels(options), json);
}

}  // namespace annulus::launch
