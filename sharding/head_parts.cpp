#include "sharding/head_parts.hpp"

#include <algorithm>

namespace annulus {
namespace {

constexpr int kMostParts = 4;
constexpr std::int64_t kPartBytes = std::int64_t{32} << 20;  // of queries: 0.1 ms of NVLink

// How many parts each rank's KV heads can be cut into.
std::int64_t most_parts(const AttentionPlan& plan) {
  if (plan.request().block_rows > 0) return 1;
  std::int64_t least = plan.request().kv_heads;
  std::int64_t all = 0;
  for (int rank = 0; rank < plan.head_ranks(); ++rank) {
    const std::int64_t heads = plan.kv_heads_of(rank).size();
    least = std::min(least, heads);
    all += heads;
  }
  return all == plan.request().kv_heads ? std::max<std::int64_t>(least, 1) : 1;
}

}  // namespace

std::vector<HeadPart> head_parts(const AttentionPlan& plan, int parts) {
  const bool whole = parts <= 1 || parts > most_parts(plan);
  std::vector<HeadPart> all(whole ? 1 : static_cast<std::size_t>(parts));
  for (int rank = 0; rank < plan.head_ranks(); ++rank) {
    const Span q = plan.q_heads_of(rank);
    const Span kv = plan.kv_heads_of(rank);
    if (whole) {
      all.front().q.push_back(q);
      all.front().kv.push_back(kv);
      continue;
    }
    for (int part = 0; part < parts; ++part) {
      const Span some{kv.begin + kv.size() * part / parts,
                      kv.begin + kv.size() * (part + 1) / parts};
      const std::int64_t offset = plan.request().q_head_offset;
      HeadPart& to = all[static_cast<std::size_t>(part)];
      to.kv.push_back(some);
      to.q.push_back(intersect(
          q, {some.begin * plan.group_size() - offset, some.end * plan.group_size() - offset}));
    }
  }
  return all;
}

int choose_head_parts(const AttentionPlan& plan, const AttentionSizes& sizes) {
  const PlanRequest& request = plan.request();
  const std::int64_t bytes = request.batch * request.q_layout.seq() / plan.ranks() *
                             request.q_heads * sizes.head_dim * sizes.element_bytes;
  const std::int64_t most = std::min<std::int64_t>(kMostParts, most_parts(plan));
  return static_cast<int>(std::clamp<std::int64_t>(bytes / kPartBytes, 1, most));
}

}  // namespace annulus
