#pragma once

#include <cstdint>
#include <vector>

#include "kernels/sm90/forward_launch.hpp"

namespace annulus::kernels::sm90 {

/// Of a tile.
struct TileShape {
  std::int32_t queries;
  std::int32_t block = 128;  // keys at a time
  bool short_first = false;  // what does not fill a tile comes first, not last, where that pays

  friend bool operator==(const TileShape&, const TileShape&) = default;
};

/// The tiles of a launch and the slices that meet each, longest first. Pure host arithmetic.
struct ForwardWork {
  std::vector<TileSlice> slices;
  std::vector<TileEntry> entries;  // empty: `tiles` equal tiles which all meet every slice
  std::int32_t tiles = 0;
  bool last_tile_first = false;
  std::int32_t short_entries = 0;  // at the end of the order
  bool per_batch = false;          // entries name their batch row
  std::int64_t equal_keys = 0;     // what each tile reads; 0: not all the same
  bool rows_by_slice = false;      // entries end with the rows of their first slice
  std::int32_t missing_rows = 0;   // of the first tile where there are no entries

  std::int32_t rows() const {
    return entries.empty() ? tiles : static_cast<std::int32_t>(entries.size());
  }
};

/// How the last tiles of a launch are cut so that its thread blocks end together.
struct TailCut {
  std::int32_t whole = 0;    // tiles before those that are cut
  std::int32_t pieces = 1;   // of each tile after them
  std::int32_t longest = 0;  // blocks of a tile's first piece, which come before all the others
};

/// For `tiles` tiles of `blocks` blocks of keys each: equal pieces, or one for each multiprocessor
/// that gets a tile and as many short ones as the others do meanwhile.
TailCut cut_tail(std::int32_t tiles, std::int64_t blocks, std::int32_t multiprocessors);

/// Query-key pairs that tiles of this shape compute, in whole blocks of keys. Where there are
/// entries, a tile's ends count as a block.
double computed_pairs(std::span<const ForwardSegment> segments, std::int64_t batch,
                      std::int64_t seq_q, const TileShape& tile);

/// Where there are entries, tiles end where slices begin or end unless that costs too much.
ForwardWork plan_forward(std::span<const ForwardSegment> segments, std::int64_t batch,
                         std::int64_t seq_q, const TileShape& tile);

}  // namespace annulus::kernels::sm90
