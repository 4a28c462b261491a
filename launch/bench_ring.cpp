#include "launch/bench_ring.hpp"

#include <fmt/format.h>
#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <span>
#include <vector>

#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "launch/bench_ring_options.hpp"
#include "launch/bench_row.hpp"
#include "launch/destinations.hpp"
#include "launch/plan_options.hpp"
#include "launch/process_memory.hpp"
#include "launch/rank_attention.hpp"
#include "launch/rank_rates.hpp"
#include "launch/report.hpp"
#include "runtime/agreement.hpp"
#include "runtime/context.hpp"
#include "runtime/default_backend.hpp"
#include "runtime/rates_file.hpp"
#include "runtime/tensor.hpp"
#include "runtime/text_file.hpp"
#include "runtime/trace.hpp"
#include "sharding/execution.hpp"
#include "sharding/hybrid.hpp"
#include "sharding/memory_model.hpp"
#include "sharding/simulate.hpp"
#include "sharding/solo_communicator.hpp"

namespace annulus::launch {
namespace {

// The most memory that any rank takes for its tensors and `run`, beside what was planned: one line
// of JSON. What a first run leaves behind is not the plan's: scratch of kernels, pools of MPI. How
// many buffers are full at once depends on when messages come, so that the most of some runs
// counts.
void print_memory(Communicator& world, std::string_view direction, std::int64_t tensors,
                  std::int64_t planned_buffers, int repeats, const std::function<void()>& run) {
  mallopt(M_MMAP_THRESHOLD, 256 << 10);  // freed memory goes back
  run();
  world.barrier();
  const std::int64_t before = resident_bytes() - resident_window_bytes(Windows::own) -
                              resident_window_bytes(Windows::others);
  reset_peak();
  for (int i = 0; i < repeats; ++i) run();
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

// True on the first of the ranks that share a device.
bool is_first_on_device(const Context& context) {
  const kernels::cuda::DeviceIdentity mine = kernels::cuda::device_identity();
  std::vector<kernels::cuda::DeviceIdentity> all(static_cast<std::size_t>(context.size()));
  context.world().all_gather(std::as_bytes(std::span(&mine, 1)),
                             std::as_writable_bytes(std::span(all)));
  return std::find(all.begin(), all.end(), mine) - all.begin() == context.rank();
}

// The whole attention on every device at the same time, each by one rank: what sharing it costs.
// All of them work as much as they do together, so that none is hotter, hence slower, than others.
class EachAlone {
 public:
  EachAlone(const Context& context, const RingOptions& options, const Place& place)
      : place_(place), ranks_(place.device) {
    if (place.device == Device::cpu || context.size() == 1) return;
    measured_ = true;
    if (!is_first_on_device(context)) return;
    PlanOptions whole = options.plan;
    whole.mesh = "sp=1";
    const PlannedAttention planned = plan_attention(whole);
    plan_.emplace(planned.request, 0);
    tensors_.emplace(*planned.request, planned.sizes, *parse_dtype(whole.dtype), 0, place.device);
  }
  bool measured() const { return measured_; }
  void forward() {
    if (plan_) execute_forward(ranks_, *plan_, tensors_->forward());
    place_.finish();
  }
  void compute_delta() {
    if (plan_) tensors_->compute_delta();
  }
  void backward() {
    if (plan_) execute_backward(ranks_, *plan_, tensors_->backward());
    place_.finish();
  }
  /// From the fastest run of each rank to what a device takes that is as fast as all on average.
  double mean_seconds(Communicator& world, double mine) const {
    const double rate = plan_ ? 1.0 / mine : 0.0;
    std::vector<double> rates(static_cast<std::size_t>(world.size()));
    world.all_gather(std::as_bytes(std::span(&rate, 1)), std::as_writable_bytes(std::span(rates)));
    const auto devices = rates.size() - std::count(rates.begin(), rates.end(), 0.0);
    return static_cast<double>(devices) / std::accumulate(rates.begin(), rates.end(), 0.0);
  }

 private:
  const Place& place_;
  SoloCommunicator ranks_;
  bool measured_ = false;
  std::optional<AttentionPlan> plan_;
  std::optional<RankAttention> tensors_;
};

struct Measured {
  double seconds = 0.0;
  double exposed_seconds = 0.0;  // of the rank that waits most
  double buffer_bytes = 0.0;     // of the rank that holds most
  double bytes_sent = 0.0;
  double alone_seconds = 1e30;  // of one device, in turn with the ranks together
};

using Seconds = std::chrono::duration<double>;
constexpr Seconds kLongestRest{0.04};

// Devices rest between runs, but not for long: under load their clocks fall, and a run should not
// find them as the one before has left them. The host does not: it would wake up slow.
void rest(const Place& place, Seconds time) {
  if (place.device == Device::cpu) return;
  const auto end = std::chrono::steady_clock::now() + std::min(time, kLongestRest);
  while (std::chrono::steady_clock::now() < end) {
  }
}

// Of this rank.
double seconds_of(Communicator& world, const Place& place, const std::function<void()>& step) {
  world.barrier();
  const auto begin = std::chrono::steady_clock::now();
  step();
  const Seconds took = std::chrono::steady_clock::now() - begin;
  rest(place, 2 * took);
  return took.count();
}

Measured measure(Communicator& world, const Place& place, int repeats,
                 const std::function<void(ExecutionReport&)>& run, const EachAlone& alone,
                 const std::function<void()>& run_alone) {
  Measured best;
  best.seconds = 1e30;
  double alone_seconds = 1e30;  // of this rank
  for (int i = 0; i < repeats; ++i) {
    ExecutionReport report;
    const double seconds = largest(world, seconds_of(world, place, [&] { run(report); }));
    const double exposed = largest(world, report.exposed_seconds);
    const double buffer = largest(world, static_cast<double>(report.buffer_bytes));
    const double sent = largest(world, static_cast<double>(report.bytes_sent));
    if (seconds < best.seconds) best = {seconds, exposed, buffer, sent};
    if (alone.measured())
      alone_seconds = std::min(alone_seconds, seconds_of(world, place, run_alone));
  }
  if (alone.measured()) best.alone_seconds = alone.mean_seconds(world, alone_seconds);
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

// Before anything is measured, what could not be written in the end is refused.
void check_destinations(Communicator& world, const RingOptions& options) {
  agree(world, [&] {
    if (world.rank() != 0) return;
    require_distinct_files("annulus bench ring",
                           {{"--trace", options.trace}, {"--rates-out", options.rates_out}}, {});
    if (!options.trace.empty()) require_writable_text("trace", options.trace);
    if (!options.rates_out.empty()) require_writable_text("rates", options.rates_out);
  });
}

}  // namespace

void bench_ring(Arguments arguments) {
  std::optional<RingOptions> options = parse_ring_options(arguments);
  if (!options) return;
  Context context;
  Communicator& world = context.world();
  check_destinations(world, *options);
  options->plan.mesh = fmt::format("sp={}", context.size());
  const bool chooses = options->plan.operation == "auto";
  if (chooses) options->plan.operation = "ring";
  PlannedAttention planned = plan_attention(options->plan);
  if (options->node_ranks > 0) {
    auto request = std::make_shared<PlanRequest>(*planned.request);
    request->node_ranks = options->node_ranks;
    planned.request = std::move(request);
  }
  const DType dtype = *parse_dtype(options->plan.dtype);
  const Place place = place_of(context, *options, planned.sizes, dtype);
  RankAttention tensors(*planned.request, planned.sizes, dtype, context.rank(), place.device);
  EachAlone alone(context, *options, place);
  Rates rates =
      measure_rates(context, place, *planned.request, planned.sizes, dtype, options->repeats);
  rates.reads_in_place = rates.reads_in_place && options->in_place;
  rates.one_device = rates.one_device && options->in_place;
  rates.one_launch = rates.one_launch && options->one_launch;
  if (chooses) planned.request = choose_scheme(*planned.request, planned.sizes, rates, true);
  const AttentionPlan plan(planned.request, context.rank());

  PlanRunner run(place.ranks, plan);
  ExecuteOptions execute;
  execute.in_place = options->in_place;
  if (options->memory) {
    const std::int64_t shards = shard_bytes(plan, planned.sizes, false);
    const std::int64_t all_shards = shard_bytes(plan, planned.sizes, true);
    print_memory(world, "forward", shards,
                 forward_buffer_bytes(plan, planned.sizes, row_access(rates)), options->repeats,
                 [&] { run.forward(tensors.forward(), execute); });
    tensors.compute_delta();
    print_memory(world, "backward", all_shards,
                 backward_buffer_bytes(plan, planned.sizes, row_access(rates)), options->repeats,
                 [&] { run.backward(tensors.backward(), execute); });
    return;
  }
  execute.one_launch = options->one_launch;
  const auto forward_step = [&](ExecutionReport& report) {
    execute.report = &report;
    run.forward(tensors.forward(), execute);
    place.finish();
  };
  const Measured forward =
      measure(world, place, options->repeats, forward_step, alone, [&] { alone.forward(); });
  tensors.compute_delta();
  alone.compute_delta();
  const auto backward_step = [&](ExecutionReport& report) {
    execute.report = &report;
    run.backward(tensors.backward(), execute);
    place.finish();
  };
  const Measured backward =
      measure(world, place, options->repeats, backward_step, alone, [&] { alone.backward(); });
  if (!options->trace.empty()) {
    rest(place, kLongestRest);
    start_trace();
    execute.report = nullptr;
    execute.recorder = trace_recorder();
    world.barrier();
    run.forward(tensors.forward(), execute);
    place.finish();
    rest(place, kLongestRest);
    world.barrier();
    run.backward(tensors.backward(), execute);
    place.finish();
    write_trace(world, options->trace);
  }
  const double forward_buffer = largest(
      world, static_cast<double>(forward_buffer_bytes(plan, planned.sizes, row_access(rates))));
  const double backward_buffer = largest(
      world, static_cast<double>(backward_buffer_bytes(plan, planned.sizes, row_access(rates))));
  if (context.rank() != 0) return;

  const Simulation forward_plan = simulate(planned.request, planned.sizes, rates, Pass::forward);
  const Simulation backward_plan = simulate(planned.request, planned.sizes, rates, Pass::backward);
  if (!options->rates_out.empty()) write_rates(options->rates_out, rates);
  const double ranks = context.size();
  std::vector<BenchRow> rows{row_of(planned, *options, "forward", forward.seconds,
                                    forward_plan.flops, rates.forward_flops * ranks),
                             row_of(planned, *options, "backward", backward.seconds,
                                    backward_plan.flops, rates.backward_flops * ranks)};
  if (alone.measured()) {
    rows.push_back(alone_row(rows[0], forward.alone_seconds));
    rows.push_back(alone_row(rows[1], backward.alone_seconds));
  }
  print_rows(rows, options->plan.json);
  if (options->plan.json) return;
  if (alone.measured()) {
    fmt::print("each rank at {:.3f} forward and {:.3f} backward of the rate of one alone\n",
               forward.alone_seconds / (ranks * forward.seconds),
               backward.alone_seconds / (ranks * backward.seconds));
  }
  print_beside_plan("forward", forward, forward_plan, static_cast<std::int64_t>(forward_buffer));
  print_beside_plan("backward", backward, backward_plan,
                    static_cast<std::int64_t>(backward_buffer));
}

}  // namespace annulus::launch
