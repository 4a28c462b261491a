#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sharding/attention_plan.hpp"
#include "sharding/cost_model.hpp"

namespace annulus {

/// When a rank works on a stage, in seconds from the start of the operation.
struct StageTime {
  int number = 0;
  double transfer_begin = 0.0;  // of what the stage computes on
  double transfer_end = 0.0;
  double compute_begin = 0.0;
  double compute_end = 0.0;
  int peer = 0;  // rank that most of its rows come from
  std::int64_t bytes_received = 0;
};

struct RankTimeline {
  int rank = 0;
  double head_exchange_seconds = 0.0;  // before the stages
  std::vector<StageTime> stages;
  double compute_seconds = 0.0;
  double exposed_seconds = 0.0;
  double seconds = 0.0;
  std::int64_t bytes_sent = 0;
  std::int64_t peak_memory_bytes = 0;
};

enum class Pass : std::uint8_t { forward, backward };

/// What executing a request would cost. Up to kTimelines ranks are followed all together, each
/// waiting for the others; of more ranks, those with the least and the most to do and some between
/// are followed alone, while the totals stay exact.
struct Simulation {
  static constexpr int kTimelines = 64;

  std::vector<RankTimeline> timelines;
  double seconds = 0.0;  // of the slowest rank
  double flops = 0.0;    // of all ranks
  double imbalance = 1.0;
  std::int64_t bytes_sent = 0;          // by all ranks
  std::int64_t network_bytes_sent = 0;  // of it, between nodes
  std::int64_t peak_memory_bytes = 0;   // of the rank with the most
};

/// Walks the plans that execute_forward or execute_backward would.
Simulation simulate(const std::shared_ptr<const PlanRequest>& request, const AttentionSizes& sizes,
                    const Rates& rates, Pass pass);

/// The request with the scheme and, for a hybrid, the node size for which the simulated time of the
/// pass (forward, or both when `backward`) is least. Schemes that cannot serve it are passed over.
std::shared_ptr<const PlanRequest> choose_scheme(const PlanRequest& request,
                                                 const AttentionSizes& sizes, const Rates& rates,
                                                 bool backward);

}  // namespace annulus
