#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "launch/attention_cut.hpp"
#include "runtime/checkpoint.hpp"

namespace annulus::launch {

/// Rows of one batch row and head of a tensor [batch, seq, heads, dim].
struct RowSample {
  std::int64_t batch = 0;
  std::int64_t head = 0;
  std::vector<std::int64_t> rows;  // rising
};

struct SampleSize {
  double row_work = 1.0;  // products of two numbers that a row takes
  double work = 1.0;      // that all of them may take
  std::size_t most_heads = 64;
  std::uint64_t seed = 0;
};

/// Rows to recompute, the same wherever it is called: all of them where `work` allows that,
/// otherwise random ones, always with the first and the last, and of at most `most_heads` pairs of
/// a batch row and a head.
std::vector<RowSample> sample_rows(const Shape& shape, const SampleSize& size);

/// Sampled query rows beside all keys.
AttentionCut row_cut(const Checkpoint& checkpoint, const RowSample& sample);

/// What attention gives for sampled queries, in double.
struct DoubleRows {
  std::vector<double> outputs;      // [1, rows, 1, value_dim]
  std::vector<double> log_sum_exp;  // [1, 1, rows]
};

/// The plain loops over all keys.
DoubleRows recompute(const CutAttention& cut);

}  // namespace annulus::launch
