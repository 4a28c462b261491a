#pragma once

#include <vector>

#include "sharding/cost_model.hpp"

namespace annulus {

/// Heads that change hands and are computed at a time: of each rank of plan.head_ranks(), in their
/// order.
struct HeadPart {
  std::vector<Span> q;
  std::vector<Span> kv;
};

/// Each rank's KV heads in `parts` of almost equal size, with the query heads that they serve. All
/// in one where ranks share KV heads or some have fewer than `parts`, and where results must not
/// depend on the number of ranks.
std::vector<HeadPart> head_parts(const AttentionPlan& plan, int parts);

/// So many that the rows of one part travel while another's are computed, and no more than pay for
/// a kernel call each. The same on all ranks.
int choose_head_parts(const AttentionPlan& plan, const AttentionSizes& sizes);

}  // namespace annulus
