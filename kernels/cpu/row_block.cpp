#include "kernels/cpu/row_block.hpp"

#include <algorithm>

namespace annulus::kernels {

Span heads_of_kv_head(const AttentionProblem& problem, std::int64_t kv_head) {
  const std::int64_t group = problem.groups.group_size > 0 ? problem.groups.group_size
                                                           : problem.q_heads() / problem.kv_heads();
  const std::int64_t begin = kv_head * group - problem.groups.q_head_offset;
  return intersect({begin, begin + group}, {0, problem.q_heads()});
}

std::vector<Slice> slices_of(const AttentionProblem& problem, const RowBlock& block) {
  std::vector<Slice> slices;
  for (const Slice& slice : problem.mask.of_batch(block.batch)) {
    const Slice part = clip(slice, block.queries, block.keys);
    if (!part.q.empty() && !part.k.empty()) slices.push_back(part);
  }
  return slices;
}

TileRows rows_of_tile(const RowBlock& block, std::int64_t first_row, std::int64_t most) {
  TileRows rows;
  rows.first_row = first_row;
  rows.count = std::min(most, block.rows() - first_row);
  const std::int64_t heads = block.q_heads.size();
  for (std::int64_t lane = 0; lane < kMaxLanes; ++lane) {
    const std::int64_t row = first_row + std::min(lane, rows.count - 1);
    const auto i = static_cast<std::size_t>(lane);
    rows.query[i] = block.queries.begin + row / heads;
    rows.head[i] = block.q_heads.begin + row % heads;
  }
  rows.queries = {rows.query[0], rows.query[static_cast<std::size_t>(rows.count - 1)] + 1};
  return rows;
}

}  // namespace annulus::kernels
