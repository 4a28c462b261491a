#include "launch/plan.hpp"

#include <fmt/format.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <optional>

#include "kernels/error.hpp"
#include "launch/destinations.hpp"
#include "launch/failure.hpp"
#include "launch/parse.hpp"
#include "launch/plan_options.hpp"
#include "launch/plan_svg.hpp"
#include "launch/report.hpp"
#include "runtime/text_file.hpp"
#include "sharding/simulate.hpp"

namespace annulus::launch {
namespace {

constexpr std::size_t kRowsPrinted = 16;

struct Prediction {
  Simulation forward;
  std::optional<Simulation> backward;
  double planning_seconds = 0.0;

  double seconds() const { return forward.seconds + (backward ? backward->seconds : 0.0); }
};

double mean(const Simulation& simulation, double RankTimeline::*field) {
  double sum = 0.0;
  for (const RankTimeline& timeline : simulation.timelines) sum += timeline.*field;
  return sum / static_cast<double>(simulation.timelines.size());
}

double tflops(const Simulation& simulation, int groups) {
  return simulation.seconds > 0.0 ? simulation.flops * groups / simulation.seconds * 1e-12 : 0.0;
}

nlohmann::json json_of(const Simulation& simulation) {
  nlohmann::json ranks = nlohmann::json::array();
  for (const RankTimeline& timeline : simulation.timelines) {
    nlohmann::json stages = nlohmann::json::array();
    for (const StageTime& stage : timeline.stages) {
      stages.push_back({{"number", stage.number},
                        {"peer", stage.peer},
                        {"bytes_received", stage.bytes_received},
                        {"compute_begin", stage.compute_begin},
                        {"compute_end", stage.compute_end}});
    }
    ranks.push_back({{"rank", timeline.rank},
                     {"seconds", timeline.seconds},
                     {"compute_seconds", timeline.compute_seconds},
                     {"exposed_communication_seconds", timeline.exposed_seconds},
                     {"bytes_sent", timeline.bytes_sent},
                     {"peak_memory_bytes", timeline.peak_memory_bytes},
                     {"stages", std::move(stages)}});
  }
  return {{"seconds", simulation.seconds},
          {"bytes_sent", simulation.bytes_sent},
          {"network_bytes_sent", simulation.network_bytes_sent},
          {"peak_memory_bytes", simulation.peak_memory_bytes},
          {"timelines", std::move(ranks)}};
}

void print_json(const PlannedAttention& planned, const Prediction& prediction) {
  const Simulation& forward = prediction.forward;
  double compute = mean(forward, &RankTimeline::compute_seconds);
  double exposed = mean(forward, &RankTimeline::exposed_seconds);
  std::int64_t bytes = forward.bytes_sent;
  std::int64_t memory = forward.peak_memory_bytes;
  double flops = forward.flops;
  nlohmann::json passes{{"forward", json_of(forward)}};
  if (prediction.backward) {
    compute += mean(*prediction.backward, &RankTimeline::compute_seconds);
    exposed += mean(*prediction.backward, &RankTimeline::exposed_seconds);
    bytes += prediction.backward->bytes_sent;
    memory = std::max(memory, prediction.backward->peak_memory_bytes);
    flops += prediction.backward->flops;
    passes["backward"] = json_of(*prediction.backward);
  }
  const double seconds = prediction.seconds();
  const nlohmann::json json{
      {"operation", name(planned.request->scheme)},
      {"mesh", planned.mesh},
      {"ranks", planned.request->q_layout.ranks() * planned.groups},
      {"seconds", seconds},
      {"compute_seconds", compute},
      {"exposed_communication_seconds", exposed},
      {"bytes_sent", bytes * planned.groups},
      {"imbalance", forward.imbalance},
      {"tflops", seconds > 0.0 ? flops * planned.groups / seconds * 1e-12 : 0.0},
      {"peak_memory_bytes", memory},
      {"planning_seconds", prediction.planning_seconds},
      {"passes", std::move(passes)}};
  fmt::print("{}\n", json.dump(2));
}

void print_pass(std::string_view direction, const Simulation& simulation, int groups) {
  fmt::print(
      "{:<9} {:>9}  {:.4g} TFLOP/s  compute {}, exposed {} (mean)  sent {} ({} between "
      "nodes)  {} a rank at most\n",
      direction, format_seconds(simulation.seconds), tflops(simulation, groups),
      format_seconds(mean(simulation, &RankTimeline::compute_seconds)),
      format_seconds(mean(simulation, &RankTimeline::exposed_seconds)),
      format_bytes(simulation.bytes_sent * groups),
      format_bytes(simulation.network_bytes_sent * groups),
      format_bytes(simulation.peak_memory_bytes));
}

void print_table(const PlannedAttention& planned, const Prediction& prediction,
                 const PlanOptions& options) {
  const PlanRequest& request = *planned.request;
  fmt::print(
      "{}{} over {}: {} x {} tokens, {} heads of {}, {}, {}, {} layout\n", name(request.scheme),
      request.scheme == Scheme::hybrid ? fmt::format(" of {} ranks", request.node_ranks) : "",
      planned.mesh, request.q_layout.seq(), request.kv_layout.seq(), options.heads,
      options.head_dim, options.dtype, options.mask, options.layout);
  print_pass("forward", prediction.forward, planned.groups);
  if (prediction.backward) print_pass("backward", *prediction.backward, planned.groups);
  fmt::print("imbalance {:.3f} (largest share of the work over the mean); planned in {}\n\n",
             prediction.forward.imbalance, format_seconds(prediction.planning_seconds));
  fmt::print("{:>6} {:>7} {:>10} {:>10} {:>10} {:>10}  {}\n", "rank", "stages", "compute",
             "exposed", "sent", "memory", "KV from");
  std::size_t printed = 0;
  for (const RankTimeline& timeline : prediction.forward.timelines) {
    if (printed++ == kRowsPrinted) {
      fmt::print("   ... {} more\n", prediction.forward.timelines.size() - kRowsPrinted);
      break;
    }
    std::string peers;
    for (const StageTime& stage : timeline.stages) {
      if (peers.size() > 40) break;
      peers += fmt::format("{} ", stage.peer);
    }
    fmt::print("{:>6} {:>7} {:>10} {:>10} {:>10} {:>10}  {}\n", timeline.rank,
               timeline.stages.size(), format_seconds(timeline.compute_seconds),
               format_seconds(timeline.exposed_seconds), format_bytes(timeline.bytes_sent),
               format_bytes(timeline.peak_memory_bytes), peers);
  }
}

}  // namespace

void show_plan(Arguments arguments) {
  const std::optional<PlanOptions> options = parse_plan_options(arguments);
  if (!options || !is_speaking_rank()) return;
  leave_peers();
  if (!options->svg.empty()) {
    require_distinct_files("annulus plan", {{"--svg", options->svg}},
                           {{"--rates", options->rates}});
    require_writable_text("plan", options->svg);
  }
  const auto begin = std::chrono::steady_clock::now();
  const PlannedAttention planned = plan_attention(*options);
  Prediction prediction;
  prediction.forward = simulate(planned.request, planned.sizes, planned.rates, Pass::forward);
  if (options->backward) {
    prediction.backward = simulate(planned.request, planned.sizes, planned.rates, Pass::backward);
  }
  prediction.planning_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (!options->svg.empty()) {
    const std::string title =
        fmt::format("{} over {} ranks: {} tokens, {}, {} layout", name(planned.request->scheme),
                    planned.request->q_layout.ranks(), planned.request->q_layout.seq(),
                    options->mask, options->layout);
    write_text("plan", options->svg, draw_plan(title, *planned.request, prediction.forward));
  }
  if (options->json) return print_json(planned, prediction);
  print_table(planned, prediction, *options);
}

}  // namespace annulus::launch
