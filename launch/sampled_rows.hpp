#pragma once

#include <cstdint>
#include <vector>

#include "kernels/mask.hpp"
#include "launch/options.hpp"
#include "runtime/checkpoint.hpp"
#include "sharding/communicator.hpp"

namespace annulus::launch {

/// Query rows of one batch row and query head.
struct RowSample {
  std::int64_t batch = 0;
  std::int64_t q_head = 0;
  std::vector<std::int64_t> rows;  // rising
};

/// Rows to recompute, the same wherever it is called: all of them where that takes at most `work`
/// products of two numbers, otherwise random ones, always with the first and the last, and of at
/// most 64 (batch, head) pairs.
std::vector<RowSample> sample_rows(const Shape& query, std::int64_t seq_kv, std::int64_t value_dim,
                                   double work, std::uint64_t seed);

/// What attention gives for a sample, in double.
struct DoubleRows {
  std::vector<double> outputs;      // [1, rows, 1, value_dim]
  std::vector<double> log_sum_exp;  // [1, 1, rows]
};

/// Reads what the rows need, one KV head at a time, and computes them by the plain loops.
/// Collective over `alone`, which is for ranks that work on the same sample: usually of one rank.
DoubleRows recompute(Communicator& alone, const Checkpoint& checkpoint, const RunOptions& options,
                     const MaskSlices& mask, const RowSample& sample);

}  // namespace annulus::launch
