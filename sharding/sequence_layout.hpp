#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/mask.hpp"
#include "kernels/types.hpp"

namespace annulus {

/// Rows of a shard (or a buffer) that also follow each other in the global sequence:
/// row `begin + i` stands at global position `global.begin + i`.
struct RowRun {
  std::int64_t begin = 0;
  Span global;

  Span rows() const { return {begin, begin + global.size()}; }
  friend bool operator==(const RowRun&, const RowRun&) = default;
};

/// Sorts spans and joins those that overlap or touch.
void unite(std::vector<Span>& spans);

/// Runs as kernels want them for dropout.
std::vector<PositionRun> positions_of(std::span<const RowRun> runs);

/// Which rank of a sequence group holds which global row. Any length, any number of ranks, no
/// padding; a rank holds its rows in global order, and may hold none.
class SequenceLayout {
 public:
  /// A run of one rank.
  struct Chunk {
    Span global;
    int rank = 0;
    std::int64_t local_begin = 0;
  };

  /// Rank r holds one run; the first seq % ranks ranks hold one row more.
  static SequenceLayout contiguous(std::int64_t seq, int ranks);
  /// Rank r holds one run of rows_of_rank[r] rows.
  static SequenceLayout contiguous(std::span<const std::int64_t> rows_of_rank);
  /// 2N parts; rank r holds the r-th from the front and the r-th from the back, so that every rank
  /// has the same share of a causal triangle (Llama 3 context parallelism).
  static SequenceLayout zigzag(std::int64_t seq, int ranks);
  /// Equal chunks of query rows, dealt largest mask area first to the rank with the least so far
  /// that has room; every rank gets the same number of chunks, give or take one.
  static SequenceLayout balanced(const MaskSlices& mask, std::int64_t batch, std::int64_t seq,
                                 int ranks, std::int64_t chunk_rows);
  /// The same with the largest chunk that brings the imbalance below 1.02, or the best one; where
  /// that balances as well, documents stay whole on a rank (see deal_documents).
  static SequenceLayout balanced(const MaskSlices& mask, std::int64_t batch, std::int64_t seq,
                                 int ranks);

  SequenceLayout() = default;

  std::int64_t seq() const { return seq_; }
  int ranks() const { return static_cast<int>(rows_.size()); }
  std::int64_t rows(int rank) const { return rows_[static_cast<std::size_t>(rank)]; }
  std::int64_t max_rows() const;

  /// All chunks in global order; neighbours of one rank are merged.
  std::span<const Chunk> chunks() const { return chunks_; }
  /// The chunks that share rows with `global`.
  std::span<const Chunk> overlapping(Span global) const;
  /// What `rank` holds, in local and in global order.
  std::span<const RowRun> runs(int rank) const;

  /// @pre 0 <= global_row < seq()
  const Chunk& chunk_of(std::int64_t global_row) const;
  int rank_of(std::int64_t global_row) const { return chunk_of(global_row).rank; }
  std::int64_t local_row(std::int64_t global_row) const;
  /// @pre 0 <= local_row < rows(rank)
  std::int64_t global_row(int rank, std::int64_t local_row) const;

  /// The layout of nodes of so many consecutive ranks; a node holds its ranks' rows in global
  /// order. Throws usage unless the ranks divide.
  SequenceLayout grouped(int ranks_per_node) const;

  /// The same where chunks begin at multiples of `block_rows`: each block of so many rows goes to
  /// the rank that holds its first one. Throws usage unless block_rows is positive.
  SequenceLayout aligned(std::int64_t block_rows) const;

  friend bool operator==(const SequenceLayout& a, const SequenceLayout& b);

 private:
  SequenceLayout(int ranks, std::vector<Chunk> chunks);

  std::int64_t seq_ = 0;
  std::vector<std::int64_t> rows_;  // of each rank
  std::vector<Chunk> chunks_;       // in global order
  std::vector<RowRun> runs_;        // of rank 0, of rank 1, …
  std::vector<std::size_t> first_;  // rank r owns runs [first_[r], first_[r + 1])
};

/// Kept pairs of each rank's query rows, summed over the batch.
std::vector<std::int64_t> areas(const SequenceLayout& q_layout, const MaskSlices& mask,
                                std::int64_t batch);

/// Largest share over the mean; 1 when nothing is kept.
double imbalance(std::span<const std::int64_t> areas);

}  // namespace annulus
