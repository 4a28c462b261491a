#pragma once

#include <cstdint>
#include <vector>

#include "sharding/attention_plan.hpp"

namespace annulus {

/// What decides which stage moves which rows, besides layouts and mask.
struct StageRules {
  bool one_stage = false;  // everything, the rank's own rows too, in stage 1
  std::int64_t stage_rows = 0;
  std::int64_t block_rows = 0;
};

/// The stages of one rank, in order. Both ends of a transfer derive it for themselves: the receiver
/// from its query rows, the sender from its KV rows, so that no rank looks at all pairs of ranks.
std::vector<Stage> build_stages(const SequenceLayout& q_layout, const SequenceLayout& kv_layout,
                                const MaskSlices& mask, int rank, const StageRules& rules);

}  // namespace annulus
