#include "launch/bench_decode.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <functional>

#include "kernels/cpu/peak.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "launch/decode_case.hpp"
#include "launch/parse.hpp"

namespace annulus::launch {
namespace {

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Reading memory once, on all threads: the ceiling of any decode.
class MemoryRead {
 public:
  MemoryRead() : buffer_(Device::cpu, kFloats * 4) {
    fill_bytes(buffer_.data(), Device::cpu, 1, buffer_.bytes());
  }
  double bytes_per_second() const {
    volatile float sum = 0.0F;
    const auto* data = static_cast<const float*>(buffer_.data());
    const double seconds = seconds_of([&] { sum = kernels::cpu::read_floats(data, kFloats); });
    return 4.0 * static_cast<double>(kFloats) / seconds;
  }

 private:
  static constexpr std::int64_t kFloats = std::int64_t{1} << 26;
  Buffer buffer_;
};

BenchRow measure(const DecodeBenchOptions& options, const MemoryRead& memory,
                 const std::string& cache, const DecodeShape& shape) {
  const DecodeCase decode(Device::cpu, options, cache, shape);
  const auto run = [&] {
    decode_forward({decode.problem(), {}, decode.o(), decode.log_sum_exp(), {}});
  };
  run();
  std::vector<double> seconds;
  std::vector<double> ceilings;
  for (int i = 0; i < options.repeats; ++i) {
    ceilings.push_back(memory.bytes_per_second());
    seconds.push_back(seconds_of(run));
  }
  BenchRow row = decode.row(fmt::format("cpu x{}", kernels::cpu::threads()));
  row.seconds = median(seconds);
  row.rate = static_cast<double>(decode.cache_bytes()) / row.seconds * 1e-9;
  row.ceiling = median(ceilings) * 1e-9;
  return row;
}

std::vector<BenchRow> bench_cpu_decode(const DecodeBenchOptions& options) {
  const MemoryRead memory;
  std::vector<BenchRow> rows;
  for (const std::string& cache : options.caches) {
    for (const DecodeShape& shape : options.shapes) {
      rows.push_back(measure(options, memory, cache, shape));
    }
  }
  return rows;
}

// "8x32768".
DecodeShape shape_of(const std::string& text) {
  const std::size_t cross = text.find('x');
  DecodeShape shape;
  try {
    require(cross != std::string::npos, ExitCode::usage, "no x");
    shape = {std::stoll(text.substr(0, cross)), std::stoll(text.substr(cross + 1))};
    require(shape.batch > 0 && shape.seq > 0 && shape.seq < (1LL << 31), ExitCode::usage, "range");
  } catch (const std::exception&) {
    throw Error(
        ExitCode::usage,
        fmt::format("bench decode: --shape {}; accepted: SEQUENCESxTOKENS, as 8x32768", text));
  }
  return shape;
}

struct CommandLine {
  DecodeBenchOptions options;
  std::string backend = kernels::cuda::device_count() > 0 ? "cuda" : "cpu";
  std::string heads = "32:8";
  std::vector<std::string> shapes;
  bool json = false;
};

void add_options(CLI::App& app, CommandLine& line) {
  DecodeBenchOptions& options = line.options;
  app.add_option("--backend", line.backend, "where to compute")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--shape", line.shapes, "sequences x tokens of each, as 1x131072,8x32768")
      ->delimiter(',');
  app.add_option("--cache", options.caches, "how the cache lies")
      ->delimiter(',')
      ->check(CLI::IsMember({"contiguous", "paged", "mla"}))
      ->capture_default_str();
  app.add_option("--heads", line.heads, "query heads, or query:KV heads")->capture_default_str();
  app.add_option("--head-dim", options.head_dim, "elements of a head")->capture_default_str();
  app.add_option("--page-size", options.page_size, "tokens of a page")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app.add_option("--mla-heads", options.mla_heads, "query heads over a latent cache")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--dtype", options.dtype, "of queries and cache")
      ->check(CLI::IsMember({"bf16", "f16", "f32"}))
      ->capture_default_str();
  app.add_option("--repeats", options.repeats, "timed runs; the median counts")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_flag("--json", line.json, "rows for machines");
}

void complete(CommandLine& line) {
  DecodeBenchOptions& options = line.options;
  if (line.shapes.empty()) {
    line.shapes = line.backend == "cuda"
                      ? std::vector<std::string>{"1x131072", "8x32768", "64x8192"}
                      : std::vector<std::string>{"1x65536", "8x8192"};
  }
  for (const std::string& text : line.shapes) options.shapes.push_back(shape_of(text));
  const std::size_t colon = line.heads.find(':');
  options.heads = std::atoll(line.heads.c_str());
  options.kv_heads =
      colon == std::string::npos ? options.heads : std::atoll(line.heads.c_str() + colon + 1);
  require(options.kv_heads > 0 && options.heads > 0 && options.heads % options.kv_heads == 0,
          ExitCode::usage, "bench decode: --heads {}; accepted: QUERY:KV, KV divides QUERY",
          line.heads);
}

}  // namespace

void bench_decode(Arguments arguments) {
  CommandLine line;
  CLI::App app("Decode over a cache beside the memory's own rate, in turn in the same run.",
               "annulus bench decode");
  add_options(app, line);
  if (!parse(app, arguments)) return;
  complete(line);
  print_rows(
      line.backend == "cuda" ? bench_cuda_decode(line.options) : bench_cpu_decode(line.options),
      line.json);
}

}  // namespace annulus::launch
