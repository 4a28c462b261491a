#include "launch/bench_kernels.hpp"

#include <CLI/CLI.hpp>
#include <vector>

#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "launch/bench_cpu.hpp"
#include "launch/bench_cuda.hpp"
#include "launch/bench_row.hpp"
#include "launch/number_option.hpp"
#include "launch/parse.hpp"

namespace annulus::launch {
namespace {

// What either backend may be given; what is left out keeps the backend's own default.
struct KernelBenchOptions {
  std::string backend = kernels::cuda::device_count() > 0 ? "cuda" : "cpu";
  std::vector<std::int64_t> head_dims;
  std::vector<std::int64_t> seqs;
  std::vector<std::string> dtypes;
  std::int64_t group = 1;
  int repeats = 0;
  CudaBenchOptions cuda;
  CpuBenchOptions cpu;
  bool json = false;
};

void add_options(CLI::App& app, KernelBenchOptions& options) {
  app.add_option("--backend", options.backend, "where to compute")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--head-dim", options.head_dims, "head dimensions")
      ->delimiter(',')
      ->check(whole_number<>(1));
  app.add_option("--seq", options.seqs, "tokens of a sequence")
      ->delimiter(',')
      ->check(whole_number<>(1));
  app.add_option("--dtype", options.dtypes, "computation types")
      ->delimiter(',')
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_option("--group", options.group, "query heads of a KV head")
      ->check(whole_number<>(1))
      ->capture_default_str();
  app.add_option("--repeats", options.repeats, "timed runs; the median counts")
      ->check(whole_number<int>(1));
  app.add_option("--tokens", options.cuda.tokens,
                 "cuda: tokens of a call; the batch is --tokens / --seq")
      ->check(whole_number<>(1))
      ->capture_default_str();
  app.add_option("--width", options.cuda.width, "cuda: heads are --width / --head-dim")
      ->check(whole_number<>(1))
      ->capture_default_str();
  app.add_option("--heads", options.cpu.heads, "cpu: query heads")
      ->check(whole_number<>(1))
      ->capture_default_str();
  app.add_option("--mask", options.cpu.masks, "cpu: masks")
      ->delimiter(',')
      ->check(CLI::IsMember({"full", "causal", "window"}))
      ->capture_default_str();
  app.add_option("--direction", options.cpu.directions, "cpu: directions")
      ->delimiter(',')
      ->check(CLI::IsMember({"forward", "backward", "decode"}))
      ->capture_default_str();
  app.add_flag("--json", options.json, "rows for machines");
}

CudaBenchOptions cuda_options(const KernelBenchOptions& given) {
  CudaBenchOptions options = given.cuda;
  if (!given.head_dims.empty()) options.head_dims = given.head_dims;
  if (!given.seqs.empty()) options.seqs = given.seqs;
  if (given.repeats > 0) options.repeats = given.repeats;
  options.group = given.group;
  require(given.dtypes.size() <= 1 && (given.dtypes.empty() || given.dtypes[0] != "f32"),
          ExitCode::usage, "bench kernels: --dtype on cuda; accepted: one of bf16, f16");
  if (!given.dtypes.empty()) options.dtype = given.dtypes[0];
  for (const std::int64_t seq : options.seqs) {
    require(options.tokens % seq == 0, ExitCode::usage,
            "bench kernels: --seq {} does not divide --tokens {}", seq, options.tokens);
  }
  for (const std::int64_t head_dim : options.head_dims) {
    require(options.width % (head_dim * options.group) == 0, ExitCode::usage,
            "bench kernels: --width {} is no multiple of --head-dim {} times --group {}",
            options.width, head_dim, options.group);
  }
  return options;
}

CpuBenchOptions cpu_options(const KernelBenchOptions& given) {
  CpuBenchOptions options = given.cpu;
  if (!given.head_dims.empty()) options.head_dims = given.head_dims;
  if (!given.seqs.empty()) options.seqs = given.seqs;
  if (!given.dtypes.empty()) options.dtypes = given.dtypes;
  if (given.repeats > 0) options.repeats = given.repeats;
  options.group = given.group;
  require(options.heads % options.group == 0, ExitCode::usage,
          "bench kernels: --heads {} is no multiple of --group {}", options.heads, options.group);
  for (const std::int64_t head_dim : options.head_dims) {
    require(head_dim % 8 == 0, ExitCode::usage,
            "bench kernels: --head-dim {}; accepted on cpu: multiples of 8", head_dim);
  }
  return options;
}

}  // namespace

void bench_kernels(Arguments arguments) {
  KernelBenchOptions options;
  CLI::App app("Attention beside its ceiling and its peer, in turn in the same run.",
               "annulus bench kernels");
  add_options(app, options);
  if (!parse(app, arguments)) return;
  print_rows(options.backend == "cuda" ? bench_cuda_kernels(cuda_options(options))
                                       : bench_cpu_kernels(cpu_options(options)),
             options.json);
}

}  // namespace annulus::launch
