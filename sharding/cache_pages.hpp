#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/decode_attention.hpp"

namespace annulus {

/// How the sequences of a cache lie on the ranks: sequences are cut by split_evenly() into batch
/// parts, and the tokens of each are dealt in blocks to the ranks of its part.
struct CacheLayout {
  std::int64_t sequences = 1;
  std::int64_t page_size = 16;  // tokens
  std::int64_t pages = 0;       // of every rank
  std::int64_t block = 16;      // tokens of a block of the deal
  int batch_parts = 1;
  int ranks = 1;  // of a batch part

  /// Pages of a rank for one page a sequence of at most `tokens` tokens: a contiguous cache.
  static CacheLayout contiguous(std::int64_t sequences, std::int64_t tokens, int batch_parts = 1,
                                int ranks = 1);

  Span sequences_of(int batch_part) const;
  int part_of(std::int64_t sequence) const;
  CacheDeal deal(int rank) const { return {block, ranks, rank}; }
  /// Pages that `rank` needs for the first `length` tokens of a sequence.
  std::int64_t pages_for(std::int64_t length, int rank) const;
  friend bool operator==(const CacheLayout&, const CacheLayout&) = default;
};

/// Which page of a rank holds which tokens of which sequence. Lengths are known of all sequences,
/// and so is how many pages every rank has left: an append that fails, fails on all ranks alike,
/// without a word between them, and changes nothing.
class CachePages {
 public:
  /// Throws usage for extents below 1, and for more batch parts or ranks than their numbers allow.
  CachePages(const CacheLayout& layout, int batch_part, int rank);

  const CacheLayout& layout() const { return layout_; }
  CacheDeal deal() const { return layout_.deal(rank_); }
  /// The sequences whose tokens lie in this rank's batch part.
  Span sequences() const { return layout_.sequences_of(batch_part_); }

  /// Makes room for rows[s] more tokens of every sequence s. Throws bad_data for a wrong number of
  /// sequences or of rows, no_memory naming the first sequence for which a rank has too few pages:
  /// pages wanted, free and in all.
  void append(std::span<const std::int64_t> rows);
  /// Keeps the first `length` tokens of a sequence; pages without a kept token are free again.
  /// Throws bad_data for a sequence that is not there or has fewer tokens.
  void truncate(std::int64_t sequence, std::int64_t length);
  /// Forgets all of a sequence.
  void free(std::int64_t sequence) { truncate(sequence, 0); }

  /// Of all sequences, on all ranks together.
  std::span<const std::int64_t> lengths() const { return lengths_; }
  std::int64_t free_pages(int batch_part, int rank) const;

  /// As kernels read them, of this rank's sequences: [sequences], [sequences, max_pages], entries
  /// without a page are -1.
  std::span<const std::int32_t> local_lengths() const { return local_lengths_; }
  std::span<const std::int32_t> page_table() const { return page_table_; }
  std::int64_t max_pages() const { return layout_.pages; }

 private:
  std::int64_t& free_of(int batch_part, int rank);
  void resize(std::int64_t sequence, std::int64_t length);

  CacheLayout layout_;
  int batch_part_;
  int rank_;
  std::vector<std::int64_t> lengths_;
  std::vector<std::int64_t> free_;           // pages, [batch_parts, ranks]
  std::vector<std::int32_t> local_lengths_;  // [sequences of this part]
  std::vector<std::int32_t> page_table_;
  std::vector<std::int32_t> free_pages_;  // of this rank, the next to use at the end
};

}  // namespace annulus
