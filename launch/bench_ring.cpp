#include "launch/bench_ring.hpp"

#include <fmt/format.h>
#include <malloc.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <vector>

#include "kernels/error.hpp"
#include "launch/bench_row.hpp"
#include "launch/parse.hpp"
#include "launch/plan_options.hpp"
#include "launch/process_memory.hpp"
#include "launch/report.hpp"
#include "runtime/context.hpp"
#include "runtime/rates_file.hpp"
#include "runtime/tensor.hpp"
#include "runtime/trace.hpp"
#include "sharding/execution.hpp"
#include "sharding/hybrid.hpp"
#include "sharding/memory_model.hpp"
#include "sharding/simulate.hpp"

namespace annulus::launch {
namespace {

struct RingOptions {
  PlanOptions plan;
  int repeats = 3;
  std::string rates_out;
  bool in_place = true;
  bool memory = false;
  std::string trace;
  int node_ranks = 0;
};

std::optional<RingOptions> parse_ring_options(Arguments arguments) {
  RingOptions options;
  options.plan.operation = "ring";
  options.plan.seq_q = 8192;
  options.plan.heads = "8:8";
  options.plan.dtype = "f32";
  options.plan.layout = "zigzag";
  options.plan.rates = "cpu";
  CLI::App app("measures an attention over the ranks started", "annulus bench ring");
  app.add_option("--op", options.plan.operation, "ring, all_gather, ulysses or hybrid");
  app.add_option("--seq", options.plan.seq_q, "tokens")->check(CLI::PositiveNumber);
  app.add_option("--batch", options.plan.batch, "batch rows")->check(CLI::PositiveNumber);
  app.add_option("--heads", options.plan.heads, "query heads, or query:KV heads");
  app.add_option("--head-dim", options.plan.head_dim, "elements of a head");
  app.add_option("--dtype", options.plan.dtype, "f32, bf16 or f16")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_option("--mask", options.plan.mask, "as in annulus plan");
  app.add_option("--layout", options.plan.layout, "contiguous, zigzag or balanced")
      ->check(CLI::IsMember({"contiguous", "zigzag", "balanced"}));
  app.add_flag("!--messages", options.in_place, "send rows instead of reading them in place");
  app.add_flag("--reproducible", options.plan.reproducible, "the same bits for any ranks");
  app.add_option("--repeats", options.repeats, "the fastest counts")->check(CLI::PositiveNumber);
  app.add_option("--node-ranks", options.node_ranks, "hybrid: ranks that exchange heads")
      ->check(CLI::PositiveNumber);
  app.add_flag("--memory", options.memory, "print the peak of memory beside the planned one only");
  app.add_option("--trace", options.trace, "write what the last run of each pass did, as run does");
  app.add_option("--rates-out", options.rates_out, "write the measured rates for annulus plan");
  app.add_flag("--json", options.plan.json, "print for machines");
  if (!parse(app, arguments)) return std::nullopt;
  return options;
}

double largest(Communicator& ranks, double mine) {
  std::vector<double> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  return *std::max_element(all.begin(), all.end());
}

// Seconds of the slowest rank, the fastest of some runs.
double timed(Communicator& ranks, int repeats, const std::function<void()>& step) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    ranks.barrier();
    const auto begin = std::chrono::steady_clock::now();
    step();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best = std::min(best, largest(ranks, took.count()));
  }
  return best;
}

Tensor random_tensor(DType dtype, const Shape& shape, std::uint64_t seed) {
  Tensor values(DType::f32, shape);
  std::mt19937_64 random(seed);
  auto* data = static_cast<float*>(values.view().data);
  for (std::int64_t i = 0; i < shape.elements(); ++i) {
    data[i] = static_cast<float>(static_cast<double>(random() >> 11) * 0x1p-52 - 1.0);
  }
  return dtype == DType::f32 ? std::move(values) : Tensor::copy_of(values.view(), dtype);
}

// A rank's shards of one attention, forward and backward.
class RankAttention {
 public:
  RankAttention(const PlanRequest& request, const AttentionSizes& sizes, DType dtype, int rank)
      : q_rows_{request.batch, request.q_layout.rows(rank), request.q_heads, sizes.head_dim},
        kv_rows_{request.batch, request.kv_layout.rows(rank), request.kv_heads, sizes.head_dim},
        statistics_{request.batch, request.q_heads, request.q_layout.rows(rank)} {
    const auto seed = static_cast<std::uint64_t>(rank) * 8;
    q_ = random_tensor(dtype, q_rows_, seed);
    k_ = random_tensor(dtype, kv_rows_, seed + 1);
    v_ = random_tensor(dtype, kv_rows_, seed + 2);
    grad_o_ = random_tensor(dtype, q_rows_, seed + 3);
    o_ = Tensor(dtype, q_rows_);
    lse_ = Tensor(DType::f32, statistics_);
    delta_ = Tensor(DType::f32, statistics_);
    grad_q_ = Tensor(DType::f32, q_rows_);
    grad_k_ = Tensor(DType::f32, kv_rows_);
    grad_v_ = Tensor(DType::f32, kv_rows_);
    fill_bytes(o_.view().data, Device::cpu, 0, o_.shape().elements() * size_bytes(dtype));
    for (Tensor* gradient : {&grad_q_, &grad_k_, &grad_v_}) {
      fill_bytes(gradient->view().data, Device::cpu, 0, gradient->shape().elements() * 4);
    }
  }

  ForwardCall forward() {
    ForwardCall call;
    call.problem.q = q_.view();
    call.problem.k = k_.view();
    call.problem.v = v_.view();
    call.problem.scale = 1.0F / std::sqrt(static_cast<float>(q_rows_[3]));
    call.o = o_.view();
    call.log_sum_exp = lse_.view();
    return call;
  }

  BackwardCall backward() {
    BackwardCall call;
    call.problem = forward().problem;
    call.grad_o = grad_o_.view();
    call.log_sum_exp = lse_.view();
    call.delta = delta_.view();
    call.grad_q = grad_q_.view();
    call.grad_k = grad_k_.view();
    call.grad_v = grad_v_.view();
    return call;
  }

  void compute_delta() { attention_delta(o_.view(), grad_o_.view(), delta_.view()); }

 private:
  Shape q_rows_;
  Shape kv_rows_;
  Shape statistics_;
  Tensor q_, k_, v_, grad_o_, o_, lse_, delta_, grad_q_, grad_k_, grad_v_;
};

double copy_bandwidth(Communicator& ranks) {
  constexpr std::int64_t kBytes = 64 << 20;
  Tensor from(DType::u8, {kBytes});
  Tensor to(DType::u8, {kBytes});
  fill_bytes(from.view().data, Device::cpu, 1, kBytes);
  fill_bytes(to.view().data, Device::cpu, 1, kBytes);
  const double seconds = timed(ranks, 3, [&] { copy(from.view(), to.view()); });
  return static_cast<double>(kBytes) / seconds;
}

// Every rank receives from the one before it, at the same time.
double exchange_bandwidth(Communicator& ranks) {
  if (ranks.size() == 1) return 1e10;
  constexpr std::int64_t kBytes = 16 << 20;
  Tensor from(DType::u8, {kBytes});
  Tensor to(DType::u8, {kBytes});
  fill_bytes(from.view().data, Device::cpu, 1, kBytes);
  fill_bytes(to.view().data, Device::cpu, 1, kBytes);
  const int next = (ranks.rank() + 1) % ranks.size();
  const int before = (ranks.rank() + ranks.size() - 1) % ranks.size();
  const double seconds = timed(ranks, 3, [&] {
    const Send send{next, from.view().data, kBytes};
    const Receive receive{before, to.view().data, kBytes};
    ranks.exchange({&send, 1}, {&receive, 1})->wait();
  });
  return static_cast<double>(kBytes) / seconds;
}

// The ranks' kernels at the same time, each over its own rows: what a perfect ring would keep up.
Rates measure_rates(Context& context, const PlannedAttention& planned, RankAttention& tensors,
                    const RingOptions& options) {
  Communicator& world = context.world();
  const SequenceLayout& layout = planned.request->q_layout;
  const std::int64_t rows = std::min(layout.rows(context.rank()), layout.rows(0));
  // Half of the pairs kept, by a diagonal, as most stages of a causal mask have it.
  const std::vector<Slice> slices{{{0, rows}, {0, rows}, {-kUnbounded, 0}}};
  std::int64_t area = slices.front().area() * planned.request->batch * planned.request->q_heads;
  Rates rates;
  ForwardCall forward = tensors.forward();
  forward.problem.mask = {slices, {}};
  const double forward_seconds = timed(world, options.repeats, [&] { attention_forward(forward); });
  rates.forward_flops = forward_flops(area, planned.sizes) / forward_seconds;
  tensors.compute_delta();
  BackwardCall backward = tensors.backward();
  backward.problem.mask = {slices, {}};
  const double backward_seconds =
      timed(world, options.repeats, [&] { attention_backward(backward); });
  rates.backward_flops = backward_flops(area, planned.sizes) / backward_seconds;
  rates.copy_bandwidth = copy_bandwidth(world);
  rates.node_bandwidth = rates.network_bandwidth = exchange_bandwidth(world);
  rates.node_ranks = context.ranks_on_node();
  rates.hides_node_transfers = false;
  rates.reads_in_place = options.in_place;
  return rates;
}

// The most memory that any rank takes for its tensors and `run`, beside what was planned: one line
// of JSON. What a first run leaves behind is not the plan's: scratch of kernels, pools of MPI.
void print_memory(Communicator& world, std::string_view direction, std::int64_t tensors,
                  std::int64_t planned_buffers, const std::function<void()>& run) {
  mallopt(M_MMAP_THRESHOLD, 256 << 10);  // freed memory goes back
  run();
  world.barrier();
  const std::int64_t before = resident_bytes() - resident_window_bytes(Windows::own) -
                              resident_window_bytes(Windows::others);
  reset_peak();
  run();
  const std::int64_t after = peak_resident_bytes() - resident_window_bytes(Windows::others);
  const auto measured = static_cast<double>(tensors + after - before);
  const auto planned = static_cast<double>(tensors + planned_buffers);
  const double most = largest(world, measured);
  const double least = -largest(world, -measured / planned);
  const double excess = largest(world, measured / planned);
  const double most_planned = largest(world, planned);
  if (world.rank() != 0) return;
  fmt::print("{}\n", nlohmann::json{{"direction", direction},
                                    {"measured_bytes", most},
                                    {"planned_bytes", most_planned},
                                    {"least_of_planned", least},
                                    {"most_of_planned", excess}}
                         .dump());
}

struct Measured {
  double seconds = 0.0;
  double exposed_seconds = 0.0;  // of the rank that waits most
  double buffer_bytes = 0.0;     // of the rank that holds most
  double bytes_sent = 0.0;
};

Measured measure(Communicator& world, int repeats,
                 const std::function<void(ExecutionReport&)>& run) {
  Measured best;
  best.seconds = 1e30;
  for (int i = 0; i < repeats; ++i) {
    ExecutionReport report;
    const double seconds = timed(world, 1, [&] { run(report); });
    const double exposed = largest(world, report.exposed_seconds);
    const double buffer = largest(world, static_cast<double>(report.buffer_bytes));
    const double sent = largest(world, static_cast<double>(report.bytes_sent));
    if (seconds < best.seconds) best = {seconds, exposed, buffer, sent};
  }
  return best;
}

BenchRow row_of(const PlannedAttention& planned, const RingOptions& options,
                std::string_view direction, double seconds, double flops, double ceiling) {
  BenchRow row;
  row.name = std::string(name(planned.request->scheme));
  row.direction = std::string(direction);
  row.dtype = options.plan.dtype;
  row.mask = options.plan.mask;
  row.batch = planned.request->batch;
  row.heads = planned.request->q_heads;
  row.kv_heads = planned.request->kv_heads;
  row.seq_q = row.seq_kv = planned.request->q_layout.seq();
  row.head_dim = planned.sizes.head_dim;
  row.ranks = planned.request->q_layout.ranks();
  row.seconds = seconds;
  row.rate = flops / seconds * 1e-9;
  row.unit = "GFLOP/s";
  row.ceiling = ceiling * 1e-9;
  return row;
}

void print_beside_plan(std::string_view direction, const Measured& measured,
                       const Simulation& predicted, std::int64_t predicted_buffer) {
  fmt::print(
      "{:<9} measured {:>9}, predicted {:>9} ({:+.1f}%); exposed communication {} ({:.2f}%); "
      "sent {} at most; buffers {} of {} predicted\n",
      direction, format_seconds(measured.seconds), format_seconds(predicted.seconds),
      100.0 * (predicted.seconds / measured.seconds - 1.0),
      format_seconds(measured.exposed_seconds), 100.0 * measured.exposed_seconds / measured.seconds,
      format_bytes(static_cast<std::int64_t>(measured.bytes_sent)),
      format_bytes(static_cast<std::int64_t>(measured.buffer_bytes)),
      format_bytes(predicted_buffer));
}

// Executes a plan; the groups of a hybrid are made once, and keep their memory.
class PlanRunner {
 public:
  PlanRunner(Communicator& world, const AttentionPlan& plan) : world_(world), plan_(plan) {
    if (plan.scheme() == Scheme::hybrid) groups_.emplace(world, plan.head_ranks());
  }
  void forward(const ForwardCall& call, const ExecuteOptions& options) {
    if (groups_) return hybrid_forward(*groups_, plan_, call, options);
    execute_forward(world_, plan_, call, options);
  }
  void backward(const BackwardCall& call, const ExecuteOptions& options) {
    if (groups_) return hybrid_backward(*groups_, plan_, call, options);
    execute_backward(world_, plan_, call, options);
  }

 private:
  Communicator& world_;
  const AttentionPlan& plan_;
  std::optional<HybridRanks> groups_;
};

}  // namespace

void bench_ring(Arguments arguments) {
  std::optional<RingOptions> options = parse_ring_options(arguments);
  if (!options) return;
  Context context;
  Communicator& world = context.world();
  options->plan.mesh = fmt::format("sp={}", context.size());
  PlannedAttention planned = plan_attention(options->plan);
  if (options->node_ranks > 0) {
    auto request = std::make_shared<PlanRequest>(*planned.request);
    request->node_ranks = options->node_ranks;
    planned.request = std::move(request);
  }
  const DType dtype = *parse_dtype(options->plan.dtype);
  RankAttention tensors(*planned.request, planned.sizes, dtype, context.rank());
  const Rates rates = measure_rates(context, planned, tensors, *options);
  const AttentionPlan plan(planned.request, context.rank());

  PlanRunner run(world, plan);
  ExecuteOptions execute;
  execute.in_place = options->in_place;
  if (options->memory) {
    const std::int64_t shards = shard_bytes(plan, planned.sizes, false);
    const std::int64_t all_shards = shard_bytes(plan, planned.sizes, true);
    print_memory(world, "forward", shards,
                 forward_buffer_bytes(plan, planned.sizes, execute.in_place),
                 [&] { run.forward(tensors.forward(), execute); });
    tensors.compute_delta();
    print_memory(world, "backward", all_shards,
                 backward_buffer_bytes(plan, planned.sizes, execute.in_place),
                 [&] { run.backward(tensors.backward(), execute); });
    return;
  }
  const Measured forward = measure(world, options->repeats, [&](ExecutionReport& report) {
    execute.report = &report;
    run.forward(tensors.forward(), execute);
  });
  tensors.compute_delta();
  const Measured backward = measure(world, options->repeats, [&](ExecutionReport& report) {
    execute.report = &report;
    run.backward(tensors.backward(), execute);
  });
  if (!options->trace.empty()) {
    start_trace();
    execute.report = nullptr;
    execute.recorder = trace_recorder();
    world.barrier();
    run.forward(tensors.forward(), execute);
    world.barrier();
    run.backward(tensors.backward(), execute);
    write_trace(world, options->trace);
  }
  const double forward_buffer = largest(
      world, static_cast<double>(forward_buffer_bytes(plan, planned.sizes, execute.in_place)));
  const double backward_buffer = largest(
      world, static_cast<double>(backward_buffer_bytes(plan, planned.sizes, execute.in_place)));
  if (context.rank() != 0) return;

  const Simulation forward_plan = simulate(planned.request, planned.sizes, rates, Pass::forward);
  const Simulation backward_plan = simulate(planned.request, planned.sizes, rates, Pass::backward);
  if (!options->rates_out.empty()) write_rates(options->rates_out, rates);
  const double ranks = context.size();
  print_rows(std::vector<BenchRow>{row_of(planned, *options, "forward", forward.seconds,
                                          forward_plan.flops, rates.forward_flops * ranks),
                                   row_of(planned, *options, "backward", backward.seconds,
                                          backward_plan.flops, rates.backward_flops * ranks)},
             options->plan.json);
  if (options->plan.json) return;
  print_beside_plan("forward", forward, forward_plan, static_cast<std::int64_t>(forward_buffer));
  print_beside_plan("backward", backward, backward_plan,
                    static_cast<std::int64_t>(backward_buffer));
}

}  // namespace annulus::launch
