#include "launch/bench_decode.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <functional>
#include <numeric>

#include "kernels/cpu/peak.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "launch/decode_case.hpp"
#include "launch/number_option.hpp"
#include "launch/parse.hpp"
#include "launch/report.hpp"
#include "runtime/context.hpp"
#include "sharding/decode_merge.hpp"

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
  MemoryRead() : buffer_(Device::cpu, kBytes) {
    fill_bytes(buffer_.data(), Device::cpu, 1, buffer_.bytes());
  }
  static constexpr std::int64_t kBytes = std::int64_t{256} << 20;

  void read() const {
    volatile float sum = 0.0F;
    sum = kernels::cpu::read_floats(static_cast<const float*>(buffer_.data()), kBytes / 4);
    static_cast<void>(sum);
  }

 private:
  Buffer buffer_;
};

// By an exchange, in which ranks that outnumber cores wait asleep: in a collective call those that
// have read their part would poll, and take a core from those that still read.
double largest(Communicator& ranks, double mine) {
  std::vector<double> all(static_cast<std::size_t>(ranks.size()), mine);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (int peer = 0; peer < ranks.size(); ++peer) {
    if (peer == ranks.rank()) continue;
    sends.push_back({peer, &mine, sizeof(mine)});
    receives.push_back({peer, &all[static_cast<std::size_t>(peer)], sizeof(mine)});
  }
  ranks.exchange(sends, receives)->wait();
  return *std::max_element(all.begin(), all.end());
}

// Seconds of the slowest rank.
double timed(Communicator& ranks, const std::function<void()>& work) {
  ranks.barrier();
  return largest(ranks, seconds_of(work));
}

// One decode step of a rank: its part of the cache, then the exchange.
class Step {
 public:
  Step(Communicator& ranks, const DecodeCase& decode)
      : ranks_(ranks), decode_(decode), split_(ranks.size() > 1) {
    if (!split_) return;
    const DecodeProblem& problem = decode.problem();
    const std::int64_t rows = problem.tokens() * problem.q_heads();
    memory_ = Buffer(Device::cpu, rows * (problem.value_dim() + 2) * 4);
    auto* data = static_cast<float*>(memory_.data());
    const Shape statistics{1, problem.q_heads(), problem.tokens()};
    float* max = data + rows * problem.value_dim();
    state_ = {TensorView(data, DType::f32,
                         Shape{1, problem.tokens(), problem.q_heads(), problem.value_dim()}),
              TensorView(max, DType::f32, statistics),
              TensorView(max + rows, DType::f32, statistics)};
  }
  void run() const {
    if (!split_) {
      return decode_forward({decode_.problem(), {}, decode_.o(), decode_.log_sum_exp(), {}});
    }
    decode_forward({decode_.problem(), state_, {}, {}, {}});
    exchange();
  }
  void exchange() const {
    if (!split_) return;
    merge_over_ranks(ranks_, state_, decode_.o(), decode_.log_sum_exp(), MergedHeads::everywhere);
  }

 private:
  Communicator& ranks_;
  const DecodeCase& decode_;
  bool split_;
  Buffer memory_;
  AttentionState state_;
};

struct Measured {
  BenchRow row;
  double exchange_seconds = 0.0;
};

Measured measure(Communicator& ranks, const DecodeBenchOptions& options, const MemoryRead& memory,
                 const std::string& cache, const DecodeShape& shape) {
  const CacheDeal deal{options.page_size, ranks.size(), ranks.rank()};
  const DecodeCase decode(Device::cpu, options, cache, shape, deal);
  const Step step(ranks, decode);
  step.run();
  std::vector<double> seconds;
  std::vector<double> exchanges;
  std::vector<double> ceilings;
  for (int i = 0; i < options.repeats; ++i) {
    // The ranks read at the same time, and the slowest counts, as it does in a step.
    const double reading = timed(ranks, [&] { memory.read(); });
    ceilings.push_back(static_cast<double>(MemoryRead::kBytes) * ranks.size() / reading);
    seconds.push_back(timed(ranks, [&] { step.run(); }));
    exchanges.push_back(timed(ranks, [&] { step.exchange(); }));
  }
  const auto bytes = static_cast<double>(decode.cache_bytes());
  std::vector<double> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&bytes, 1)), std::as_writable_bytes(std::span(all)));
  Measured measured{decode.row(fmt::format("cpu x{}", kernels::cpu::threads())), median(exchanges)};
  measured.row.ranks = ranks.size();
  measured.row.seconds = median(seconds);
  measured.row.rate = std::accumulate(all.begin(), all.end(), 0.0) / measured.row.seconds * 1e-9;
  measured.row.ceiling = median(ceilings) * 1e-9;
  return measured;
}

void print_exchange(const Measured& measured) {
  const BenchRow& row = measured.row;
  const double reading = row.rate / row.ceiling * row.seconds;
  fmt::print(
      "{} {}x{}: a step takes {}, reading the cache once {} and the exchange {}: {:.3f} of "
      "their sum\n",
      row.name, row.batch, row.seq_kv, format_seconds(row.seconds), format_seconds(reading),
      format_seconds(measured.exchange_seconds),
      row.seconds / (reading + measured.exchange_seconds));
}

void bench_cpu_decode(const DecodeBenchOptions& options, bool json) {
  Context context;
  const MemoryRead memory;
  std::vector<Measured> all;
  for (const std::string& cache : options.caches) {
    for (const DecodeShape& shape : options.shapes) {
      all.push_back(measure(context.world(), options, memory, cache, shape));
    }
  }
  if (context.rank() != 0) return;
  std::vector<BenchRow> rows;
  for (const Measured& measured : all) rows.push_back(measured.row);
  print_rows(rows, json);
  if (json || context.size() == 1) return;
  for (const Measured& measured : all) print_exchange(measured);
}

// "8x32768".
DecodeShape shape_of(const std::string& text) {
  const std::size_t cross = std::min(text.find('x'), text.size() - 1);
  DecodeShape shape;
  require(read_whole(text.substr(0, cross), shape.batch) &&
              read_whole(text.substr(cross + 1), shape.seq) && shape.batch > 0 && shape.seq > 0 &&
              shape.seq < (1LL << 31),
          ExitCode::usage, "bench decode: --shape {}; accepted: SEQUENCESxTOKENS, as 8x32768",
          text);
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
  app.add_option("--head-dim", options.head_dim, "elements of a head")
      ->capture_default_str()
      ->check(whole_number<>(1, 512));
  app.add_option("--page-size", options.page_size, "tokens of a page")
      ->check(whole_number<>(1, 256))
      ->capture_default_str();
  app.add_option("--mla-heads", options.mla_heads, "query heads over a latent cache")
      ->check(whole_number<>(1))
      ->capture_default_str();
  app.add_option("--dtype", options.dtype, "of queries and cache")
      ->check(CLI::IsMember({"bf16", "f16", "f32"}))
      ->capture_default_str();
  app.add_option("--repeats", options.repeats, "timed runs; the median counts")
      ->check(whole_number<int>(1))
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
  const HeadCounts heads = parse_heads(line.heads, "bench decode");
  options.heads = heads.query;
  options.kv_heads = heads.kv;
}

}  // namespace

void bench_decode(Arguments arguments) {
  CommandLine line;
  CLI::App app("Decode over a cache beside the memory's own rate, in turn in the same run.",
               "annulus bench decode");
  add_options(app, line);
  if (!parse(app, arguments)) return;
  complete(line);
  if (line.backend == "cpu") return bench_cpu_decode(line.options, line.json);
  print_rows(bench_cuda_decode(line.options), line.json);
}

}  // namespace annulus::launch
