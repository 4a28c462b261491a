#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "launch/commands.hpp"
#include "sharding/attention_plan.hpp"
#include "sharding/cost_model.hpp"

namespace annulus::launch {

/// What `annulus plan` was asked for.
struct PlanOptions {
  std::string operation = "auto";
  std::string mesh = "sp=8";
  std::int64_t seq_q = 65536;
  std::int64_t seq_kv = 0;  // 0: seq_q
  std::int64_t batch = 1;
  std::string heads = "64:8";
  std::int64_t head_dim = 128;
  std::string dtype = "bf16";
  std::string mask = "causal";
  std::string layout = "balanced";
  std::string rates = "h100";
  bool backward = false;
  bool reproducible = false;
  std::string svg;
  bool json = false;
};

/// None when help was asked for and printed. Throws usage.
std::optional<PlanOptions> parse_plan_options(Arguments arguments);

/// A mask in words, its parts joined by '+': full, causal, window:L,R, prefix:N,
/// documents:0,120,1248, random-documents:COUNT or random-documents:COUNT,SEED.
AttentionMask parse_mask(const std::string& text, std::int64_t seq_q, std::int64_t seq_kv);

/// h100, cpu, or a JSON file with fields of Rates, as `annulus bench ring --rates-out` writes it.
Rates parse_rates(const std::string& text);

/// The plan that the options describe, for one sequence group: batch and heads are those of a rank
/// of it.
struct PlannedAttention {
  std::shared_ptr<const PlanRequest> request;
  AttentionSizes sizes;
  Rates rates;
  std::string mesh;
  int groups = 1;  // sequence groups of the mesh, all alike
};
PlannedAttention plan_attention(const PlanOptions& options);

}  // namespace annulus::launch
