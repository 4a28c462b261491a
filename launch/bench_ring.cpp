#include "launch/bench_ring.hpp"

#include <fmt/format.h>
#include <malloc.h>

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
#include "launch/bench_ring_options.hpp"
#include "launch/bench_row.hpp"
#include "launch/plan_options.hpp"
#include "launch/process_memory.hpp"
#include "launch/report.hpp"
#include "runtime/context.hpp"
#include "runtime/default_backend.hpp"
#include "runtime/rates_file.hpp"
#include "runtime/tensor.hpp"
#include "runtime/trace.hpp"
#include "sharding/execution.hpp"
#include "sharding/hybrid.hpp"
#include "sharding/memory_model.hpp"
#include "sharding/simulate.hpp"
#include "sharding/solo_communicator.hpp"

namespace annulus::launch {
namespace {

double largest(Communicator& ranks, double mine) {
  std::vector<double> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  return *std::max_element(all.begin(), all.end());
}

// Seconds of the slowest rank, the fastest of some runs. A step on a device waits for the device.
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

// A block of values again and again: drawing all would take longer than the measurement.
Tensor random_tensor(DType dtype, const Shape& shape, std::uint64_t seed, Device device) {
  const std::int64_t count = std::min<std::int64_t>(shape.elements(), std::int64_t{1} << 20);
  Tensor block(DType::f32, {count});
  std::mt19937_64 random(seed);
  auto* data = static_cast<float*>(block.view().data);
  for (std::int64_t i = 0; i < count; ++i) {
    data[i] = static_cast<float>(static_cast<double>(random() >> 11) * 0x1p-52 - 1.0);
  }
  Tensor values(dtype, shape, device);
  const TensorView flat(values.view().data, dtype, {shape.elements()}, device);
  for (std::int64_t begin = 0; begin < shape.elements(); begin += count) {
    const Span span{begin, std::min(begin + count, shape.elements())};
    copy(std::as_const(block).view().slice(0, {0, span.size()}), flat.slice(0, span));
  }
  return values;
}

// A rank's shards of one attention, forward and backward.
class RankAttention {
 public:
  RankAttention(const PlanRequest& request, const AttentionSizes& sizes, DType dtype, int rank,
                Device device)
      : q_rows_{request.batch, request.q_layout.rows(rank), request.q_heads, sizes.head_dim},
        kv_rows_{request.batch, request.kv_layout.rows(rank), request.kv_heads, sizes.head_dim},
        statistics_{request.batch, request.q_heads, request.q_layout.rows(rank)} {
    const auto seed = static_cast<std::uint64_t>(rank) * 8;
    q_ = random_tensor(dtype, q_rows_, seed, device);
    k_ = random_tensor(dtype, kv_rows_, seed + 1, device);
    v_ = random_tensor(dtype, kv_rows_, seed + 2, device);
    grad_o_ = random_tensor(dtype, q_rows_, seed + 3, device);
    o_ = Tensor(dtype, q_rows_, device);
    lse_ = Tensor(DType::f32, statistics_, device);
    delta_ = Tensor(DType::f32, statistics_, device);
    grad_q_ = Tensor(DType::f32, q_rows_, device);
    grad_k_ = Tensor(DType::f32, kv_rows_, device);
    grad_v_ = Tensor(DType::f32, kv_rows_, device);
    fill_bytes(o_.view().data, device, 0, o_.shape().elements() * size_bytes(dtype));
    for (Tensor* gradient : {&grad_q_, &grad_k_, &grad_v_}) {
      fill_bytes(gradient->view().data, device, 0, gradient->shape().elements() * 4);
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
    call.o = o_.view();
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

// Where the work is, and the ranks that move what it reads.
struct Place {
  Device device;
  Communicator& ranks;

  void finish() const { synchronize(device, {}); }
};

Tensor ones(std::int64_t bytes, Device device) {
  Tensor tensor(DType::u8, {bytes}, device);
  fill_bytes(tensor.view().data, device, 1, bytes);
  return tensor;
}

double copy_bandwidth(Communicator& world, const Place& place) {
  constexpr std::int64_t kBytes = 64 << 20;
  Tensor from = ones(kBytes, place.device);
  Tensor to = ones(kBytes, place.device);
  const double seconds = timed(world, 3, [&] {
    copy(from.view(), to.view());
    place.finish();
  });
  return static_cast<double>(kBytes) / seconds;
}

// Every rank receives from the one before it, at the same time.
double exchange_bandwidth(Communicator& world, const Place& place) {
  if (world.size() == 1) return 1e10;
  constexpr std::int64_t kBytes = 16 << 20;
  Tensor from = ones(kBytes, place.device);
  Tensor to = ones(kBytes, place.device);
  const int next = (world.rank() + 1) % world.size();
  const int before = (world.rank() + world.size() - 1) % world.size();
  const double seconds = timed(world, 3, [&] {
    const Send send{next, from.view().data, kBytes};
    const Receive receive{before, to.view().data, kBytes};
    place.ranks.exchange({&send, 1}, {&receive, 1})->wait();
    place.finish();
  });
  return static_cast<double>(kBytes) / seconds;
}

// The ranks' kernels at the same time, each over its own rows: what a perfect ring would keep up.
Rates measure_rates(Context& context, const Place& place, const PlannedAttention& planned,
                    RankAttention& tensors, const RingOptions& options) {
  Communicator& world = context.world();
  const SequenceLayout& layout = planned.request->q_layout;
  const std::int64_t rows = std::min(layout.rows(context.rank()), layout.rows(0));
  // Half of the pairs kept, by a diagonal, as most stages of a causal mask have it.
  const std::vector<Slice> slices{{{0, rows}, {0, rows}, {-kUnbounded, 0}}};
  std::int64_t area = slices.front().area() * planned.request->batch * planned.request->q_heads;
  Rates rates;
  ForwardCall forward = tensors.forward();
  forward.problem.mask = {slices, {}};
  const double forward_seconds = timed(world, options.repeats, [&] {
    attention_forward(forward);
    place.finish();
  });
  rates.forward_flops = forward_flops(area, planned.sizes) / forward_seconds;
  tensors.compute_delta();
  BackwardCall backward = tensors.backward();
  backward.problem.mask = {slices, {}};
  const double backward_seconds = timed(world, options.repeats, [&] {
    attention_backward(backward);
    place.finish();
  });
  rates.backward_flops = backward_flops(area, planned.sizes) / backward_seconds;
  rates.copy_bandwidth = copy_bandwidth(world, place);
  rates.node_bandwidth = rates.network_bandwidth = exchange_bandwidth(world, place);
  rates.node_ranks = context.ranks_on_node();
  rates.hides_node_transfers = place.device == Device::cuda;
  rates.reads_in_place = options.in_place && place.device == Device::cpu;
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

// The whole attention on the first rank while the others wait: what sharing a device costs.
class OneRank {
 public:
  OneRank(const Context& context, const RingOptions& options, const Place& place)
      : place_(place), ranks_(place.device) {
    if (place.device == Device::cpu || context.size() == 1 || context.rank() != 0) return;
    PlanOptions whole = options.plan;
    whole.mesh = "sp=1";
    const PlannedAttention planned = plan_attention(whole);
    plan_.emplace(planned.request, 0);
    tensors_.emplace(*planned.request, planned.sizes, *parse_dtype(whole.dtype), 0, place.device);
  }
  bool runs() const { return plan_.has_value(); }
  void forward() {
    if (runs()) execute_forward(ranks_, *plan_, tensors_->forward());
    place_.finish();
  }
  void compute_delta() {
    if (runs()) tensors_->compute_delta();
  }
  void backward() {
    if (runs()) execute_backward(ranks_, *plan_, tensors_->backward());
    place_.finish();
  }

 private:
  const Place& place_;
  SoloCommunicator ranks_;
  std::optional<AttentionPlan> plan_;
  std::optional<RankAttention> tensors_;
};

struct Measured {
  double seconds = 0.0;
  double exposed_seconds = 0.0;  // of the rank that waits most
  double buffer_bytes = 0.0;     // of the rank that holds most
  double bytes_sent = 0.0;
  double alone_seconds = 1e30;  // of one rank, in turn with the ranks together
};

Measured measure(Communicator& world, int repeats, const std::function<void(ExecutionReport&)>& run,
                 const std::function<void()>& run_alone) {
  Measured best;
  best.seconds = 1e30;
  for (int i = 0; i < repeats; ++i) {
    ExecutionReport report;
    const double seconds = timed(world, 1, [&] { run(report); });
    const double exposed = largest(world, report.exposed_seconds);
    const double buffer = largest(world, static_cast<double>(report.buffer_bytes));
    const double sent = largest(world, static_cast<double>(report.bytes_sent));
    if (seconds < best.seconds) best = {seconds, exposed, buffer, sent, best.alone_seconds};
    best.alone_seconds = std::min(best.alone_seconds, timed(world, 1, run_alone));
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

// The same work on one rank.
BenchRow alone_row(const BenchRow& together, double seconds) {
  BenchRow row = together;
  row.ranks = 1;
  row.rate *= together.seconds / seconds;
  row.seconds = seconds;
  return row;
}

// Devices where nobody says otherwise and their kernels serve the attention.
Place place_of(Context& context, const RingOptions& options, const AttentionSizes& sizes,
               DType dtype) {
  BackendNeeds needs;
  needs.dtype = dtype;
  needs.backward = true;
  needs.shape.head_dim = sizes.head_dim;
  needs.shape.value_dim = sizes.value_dim;
  needs.reproducible = options.plan.reproducible;
  const std::string backend =
      options.backend.empty() ? default_backend(context, needs) : options.backend;
  if (backend == "cpu") return {Device::cpu, context.world()};
  require(context.device() == Device::cuda, ExitCode::usage,
          "bench ring: --backend cuda needs a CUDA device on every rank");
  const Mesh mesh = Mesh::parse(options.plan.mesh, context.size());
  return {Device::cuda, context.along(mesh, {"sp"}, *parse_transport(options.transport))};
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
  const Place place = place_of(context, *options, planned.sizes, dtype);
  RankAttention tensors(*planned.request, planned.sizes, dtype, context.rank(), place.device);
  OneRank alone(context, *options, place);
  const Rates rates = measure_rates(context, place, planned, tensors, *options);
  const AttentionPlan plan(planned.request, context.rank());

  PlanRunner run(place.ranks, plan);
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
  execute.one_launch = options->one_launch;
  const auto forward_step = [&](ExecutionReport& report) {
    execute.report = &report;
    run.forward(tensors.forward(), execute);
    place.finish();
  };
  const Measured forward = measure(world, options->repeats, forward_step, [&] { alone.forward(); });
  tensors.compute_delta();
  alone.compute_delta();
  const auto backward_step = [&](ExecutionReport& report) {
    execute.report = &report;
    run.backward(tensors.backward(), execute);
    place.finish();
  };
  const Measured backward =
      measure(world, options->repeats, backward_step, [&] { alone.backward(); });
  if (!options->trace.empty()) {
    start_trace();
    execute.report = nullptr;
    execute.recorder = trace_recorder();
    world.barrier();
    run.forward(tensors.forward(), execute);
    place.finish();
    world.barrier();
    run.backward(tensors.backward(), execute);
    place.finish();
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
  std::vector<BenchRow> rows{row_of(planned, *options, "forward", forward.seconds,
                                    forward_plan.flops, rates.forward_flops * ranks),
                             row_of(planned, *options, "backward", backward.seconds,
                                    backward_plan.flops, rates.backward_flops * ranks)};
  if (alone.runs()) {
    rows.push_back(alone_row(rows[0], forward.alone_seconds));
    rows.push_back(alone_row(rows[1], backward.alone_seconds));
  }
  print_rows(rows, options->plan.json);
  if (options->plan.json) return;
  print_beside_plan("forward", forward, forward_plan, static_cast<std::int64_t>(forward_buffer));
  print_beside_plan("backward", backward, backward_plan,
                    static_cast<std::int64_t>(backward_buffer));
}

}  // namespace annulus::launch
