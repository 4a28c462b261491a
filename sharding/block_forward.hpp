#pragma once

#include <memory>

#include "sharding/stage_compute.hpp"

namespace annulus {

/// A pass whose bits do not depend on how rows are spread over ranks: each block of a global grid
/// of KV rows gives a partial result of its own, and partials are merged in the binary tree over
/// the block index, whatever the order in which blocks arrive. Holds about two partials a level.
std::unique_ptr<ForwardPass> make_block_forward_pass(const ForwardCall& local,
                                                     const AttentionPlan& plan,
                                                     const ExecuteOptions& options);

/// Query rows, times batch rows, of all states that such a pass holds at a time, without sinks.
std::int64_t block_state_rows(const AttentionPlan& plan);

/// Rows of the grid that PlanRequest::block_rows should have: a function of the length alone.
std::int64_t reproducible_block_rows(std::int64_t seq_kv);

/// The same for PlanRequest::q_block_rows.
std::int64_t reproducible_query_rows(std::int64_t seq_q);

}  // namespace annulus
