#pragma once

#include <cstdint>

#include "kernels/attention.hpp"
#include "sharding/communicator.hpp"

namespace annulus {

/// Where the merged rows are wanted: all heads on every rank, or on each the heads that it merged.
enum class MergedHeads : std::uint8_t { everywhere, split };

/// Brings together what the ranks of a group computed from their parts of a cache, in fp32: every
/// rank receives the others' partial sums of its share of the heads, split_evenly(), merges them in
/// rank order and finishes. So each partial travels once, and the finished rows, which are shorter,
/// go to all ranks only where they are wanted everywhere.
///
/// `partial` is [1, tokens, q_heads, value_dim] with [1, q_heads, tokens] statistics; `o` is
/// [tokens, heads, value_dim], `log_sum_exp` (or absent) f32 [heads, tokens], where heads are all
/// or this rank's share. Collective. Throws peer when a transfer fails.
void merge_over_ranks(Communicator& ranks, const AttentionState& partial, const TensorView& o,
                      const TensorView& log_sum_exp, MergedHeads heads, Stream stream = {});

/// Bytes that `rank` of `ranks` sends in it; 4 bytes of log-sum-exp a row count where it is wanted.
struct MergeShape {
  std::int64_t tokens = 0;
  std::int64_t q_heads = 0;
  std::int64_t value_dim = 0;
  DType output_dtype = DType::f32;
  bool log_sum_exp = true;
};
std::int64_t merge_bytes(const MergeShape& shape, int ranks, int rank, MergedHeads heads);

}  // namespace annulus
