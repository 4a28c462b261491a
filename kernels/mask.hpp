#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/types.hpp"

namespace annulus {

enum class Coverage : std::uint8_t { none, partial, full };

inline constexpr std::int64_t kUnbounded = std::numeric_limits<std::int64_t>::max() / 4;

/// Keys allowed for a query: lo <= k - q <= hi. Causal is hi = seq_kv - seq_q (bottom-right),
/// a sliding window bounds both sides.
struct Band {
  std::int64_t lo = -kUnbounded;
  std::int64_t hi = kUnbounded;

  bool keeps(std::int64_t q, std::int64_t k) const { return lo <= k - q && k - q <= hi; }
  Coverage coverage(Span q, Span k) const;
  /// The keys that a query row may see.
  Span keys_of(std::int64_t q) const;
  /// The band for indices q' = q - q_shift, k' = k - k_shift.
  Band shifted(std::int64_t q_shift, std::int64_t k_shift) const;
  friend bool operator==(const Band&, const Band&) = default;
};

/// A rectangle of (query, key) pairs cut by a band: the one form of every mask that a kernel sees.
struct Slice {
  Span q;
  Span k;
  Band band;

  bool keeps(std::int64_t query, std::int64_t key) const {
    return q.contains(query) && k.contains(key) && band.keeps(query, key);
  }
  /// How much of the tile rows × columns the slice keeps.
  Coverage coverage(Span rows, Span columns) const;
  /// Number of kept pairs, in closed form.
  std::int64_t area() const;
  friend bool operator==(const Slice&, const Slice&) = default;
};

/// The part of `slice` inside rows × columns, with the row and key ranges clipped to pairs that
/// exist; an empty slice when there are none.
Slice clip(const Slice& slice, Span rows, Span columns);

/// Slices of every batch row. No two slices of one batch row share a pair.
struct SliceList {
  std::span<const Slice> slices;
  /// Batch row b owns slices [batch_offsets[b], batch_offsets[b+1]); when empty, every row owns
  /// all.
  std::span<const std::int64_t> batch_offsets;

  std::span<const Slice> of_batch(std::int64_t b) const {
    if (batch_offsets.empty()) return slices;
    const auto i = static_cast<std::size_t>(b);
    const auto begin = static_cast<std::size_t>(batch_offsets[i]);
    return slices.subspan(begin, static_cast<std::size_t>(batch_offsets[i + 1]) - begin);
  }
};

/// A run of consecutive tokens with one segment id. Id -1 is padding: it attends to nothing and
/// nothing attends to it.
struct Segment {
  Span rows;
  std::int64_t id = 0;
  friend bool operator==(const Segment&, const Segment&) = default;
};

/// Run-length form of segment ids.
std::vector<Segment> segments_of(std::span<const std::int32_t> ids);

/// The mask a user asks for, in global token positions. Its parts are combined by "and".
struct AttentionMask {
  /// Keys up to the query, bottom-right aligned: k <= q + seq_kv - seq_q.
  bool causal = false;
  /// Keys from `window_left` before to `window_right` after, in the same alignment; -1: unbounded.
  std::int64_t window_left = -1;
  std::int64_t window_right = -1;
  /// Segments of each batch row (or one entry for all rows); empty: one segment. With cumulative
  /// lengths on both sides segment i of q meets segment i of kv and the alignment is per segment.
  std::vector<std::vector<Segment>> q_segments;
  std::vector<std::vector<Segment>> kv_segments;
  bool align_per_segment = false;
  /// Prefix-LM: keys below prefix_length[b] are seen by every query of batch row b (in spite of
  /// `causal`); empty: none.
  std::vector<std::int64_t> prefix_lengths;
  /// Block-sparse: kept[(q / block_q) * blocks_kv + k / block_kv]; block_q = 0: not used.
  std::int64_t block_q = 0;
  std::int64_t block_kv = 0;
  std::vector<std::uint8_t> kept_blocks;
};

/// Segments from cumulative lengths [0, n1, n1+n2, …]: ids 0, 1, …; rows beyond the last offset
/// are padding. Throws bad_data unless the offsets start at 0, never fall and end within `seq`.
std::vector<Segment> segments_of_offsets(std::span<const std::int64_t> offsets, std::int64_t seq);

/// Owned slices of a mask.
struct MaskSlices {
  std::vector<Slice> slices;
  std::vector<std::int64_t> batch_offsets;  // empty: the same for every batch row

  SliceList view() const { return {slices, batch_offsets}; }
  /// Kept pairs of one batch row.
  std::int64_t area(std::int64_t batch) const;
};

/// Turns a mask into disjoint slices. Throws bad_data when segments do not cover the lengths,
/// blocks do not fit them or a prefix is below 0; usage for a window below -1.
MaskSlices make_slices(const AttentionMask& mask, std::int64_t batch, std::int64_t seq_q,
                       std::int64_t seq_kv);

}  // namespace annulus
