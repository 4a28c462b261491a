#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.hpp"
#include "sharding/attention_plan.hpp"

namespace annulus {

/// What one kernel call of a stage covers.
struct StagePart {
  Span batch;
  Span rows;                           // of the stage's buffer
  MaskSlices slices;                   // k counted from rows.begin
  std::vector<PositionRun> positions;  // of the rows, counted from rows.begin
  std::int64_t column_begin = 0;       // global position of the first row
  int peer = -1;                       // owner of the rows, where they are read in place
  std::int64_t peer_row = 0;           // the first row in the owner's shard
};

/// The query rows that a part's slices touch.
Span query_rows(const StagePart& part);

/// Positions of the rows [rows), counted from rows.begin.
std::vector<PositionRun> positions_within(std::span<const PositionRun> runs, Span rows);

/// What is left of a part for the query rows `q` and those of its own rows that are `k`, both
/// counted from where they begin.
StagePart part_within(const StagePart& part, Span q, Span k);

/// How far a stage must be cut up.
enum class Granularity : std::uint8_t {
  stage,      // everything at once
  positions,  // one list of positions a call (dropout)
  run,        // consecutive global positions (bias and dense mask are cut by columns)
  piece,      // rows of one owner, to be read where they lie
  block,      // rows of one block of the global grid
};

/// Whether a stage's rows come in so few pieces that a kernel call for each costs less than to
/// gather them, where peers' memory can be read.
bool few_pieces(const Stage& stage);

/// Whether a rank that can read all its peers' rows computes on all of them in one kernel call: no
/// state to carry and no stage to wait for. Not with a mask of so many slices that every tile of
/// the call would search them.
bool joins_stages(const AttentionPlan& plan);
/// True when one call may have the slices of all stages.
bool few_slices(const AttentionPlan& plan);

/// Parts with something to compute, in the order of the buffer.
std::vector<StagePart> parts_of(const Stage& stage, std::int64_t batch, Granularity granularity,
                                std::int64_t block_rows = 0);

}  // namespace annulus
