#include "kernels/sm90/forward_work.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace annulus::kernels::sm90 {
namespace {

constexpr std::int64_t kBandLimit = std::int64_t{1} << 30;

std::int32_t clamp_band(std::int64_t bound) {
  return static_cast<std::int32_t>(std::clamp(bound, -kBandLimit, kBandLimit));
}

TileSlice tile_slice(const Slice& slice, int segment) {
  return {static_cast<std::int32_t>(slice.q.begin),
          static_cast<std::int32_t>(slice.q.end),
          static_cast<std::int32_t>(slice.k.begin),
          static_cast<std::int32_t>(slice.k.end),
          clamp_band(slice.band.lo),
          clamp_band(slice.band.hi),
          segment,
          0};
}

/// Keys that a tile of queries reads.
std::int64_t keys_read(const TileSlice& slice, Span queries) {
  const std::int64_t q_begin = std::max<std::int64_t>(queries.begin, slice.q_begin);
  const std::int64_t q_last = std::min<std::int64_t>(queries.end, slice.q_end) - 1;
  if (q_begin > q_last) return 0;
  const std::int64_t begin = std::max<std::int64_t>(slice.k_begin, q_begin + slice.lo);
  const std::int64_t end = std::min<std::int64_t>(slice.k_end, q_last + slice.hi + 1);
  return std::max<std::int64_t>(end - begin, 0);
}

std::int64_t keys_read(std::span<const TileSlice> slices, Span queries) {
  std::int64_t keys = 0;
  for (const TileSlice& slice : slices) keys += keys_read(slice, queries);
  return keys;
}

bool differs_by_batch(std::span<const ForwardSegment> segments) {
  return std::any_of(segments.begin(), segments.end(),
                     [](const ForwardSegment& s) { return !s.mask.batch_offsets.empty(); });
}

std::vector<TileSlice> slices_of(std::span<const ForwardSegment> segments, std::int64_t batch_row) {
  std::vector<TileSlice> slices;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    for (const Slice& slice : segments[i].mask.of_batch(batch_row)) {
      if (!slice.q.empty() && !slice.k.empty()) {
        slices.push_back(tile_slice(slice, static_cast<int>(i)));
      }
    }
  }
  return slices;
}

/// Rows of queries, each with the slices that may meet it: meets[begin] to meets[end - 1].
struct Rows {
  Span queries;
  std::size_t begin = 0, end = 0;
};

struct TileList {
  std::vector<Rows> tiles;
  std::vector<std::size_t> meets;
};

/// Which slices meet which of adjoining rows.
TileList meet(std::vector<Rows> tiles, std::span<const TileSlice> slices) {
  TileList list{std::move(tiles), {}};
  const auto met_by = [&list](const TileSlice& slice) {
    const auto first =
        std::upper_bound(list.tiles.begin(), list.tiles.end(), slice.q_begin,
                         [](std::int64_t q, const Rows& tile) { return q < tile.queries.end; });
    const auto last =
        std::lower_bound(first, list.tiles.end(), slice.q_end,
                         [](const Rows& tile, std::int64_t q) { return tile.queries.begin < q; });
    return std::span(first, last);
  };
  for (const TileSlice& slice : slices) {
    for (Rows& tile : met_by(slice)) ++tile.end;
  }
  std::size_t count = 0;
  for (Rows& tile : list.tiles) {
    tile.begin = count;
    count += std::exchange(tile.end, count);
  }
  list.meets.resize(count);
  for (std::size_t i = 0; i < slices.size(); ++i) {
    for (Rows& tile : met_by(slices[i])) list.meets[tile.end++] = i;
  }
  return list;
}

/// Tiles that begin at multiples of their rows.
TileList whole_tiles(std::span<const TileSlice> slices, std::int64_t seq_q,
                     std::int32_t tile_queries) {
  std::vector<Rows> tiles;
  for (std::int64_t q = 0; q < seq_q; q += tile_queries) {
    tiles.push_back({{q, std::min(q + tile_queries, seq_q)}});
  }
  return meet(std::move(tiles), slices);
}

/// Tiles that end where slices begin or end. What is left of a run of rows comes first, where a
/// causal edge leaves it the fewest keys.
TileList cut_tiles(std::span<const TileSlice> slices, std::int64_t seq_q,
                   std::int32_t tile_queries) {
  std::vector<std::int64_t> bounds{0, seq_q};
  for (const TileSlice& slice : slices) {
    bounds.push_back(slice.q_begin);
    bounds.push_back(slice.q_end);
  }
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  std::vector<Rows> tiles;
  for (std::size_t i = 0; i + 1 < bounds.size(); ++i) {
    std::int64_t begin = bounds[i];
    const std::int64_t left = (bounds[i + 1] - begin) % tile_queries;
    if (left > 0) tiles.push_back({{begin, begin + left}});
    for (begin += left; begin < bounds[i + 1]; begin += tile_queries) {
      tiles.push_back({{begin, begin + tile_queries}});
    }
  }
  return meet(std::move(tiles), slices);
}

/// In pairs; a tile's ends count as a block.
double cost(const TileList& list, std::span<const TileSlice> slices, const TileShape& shape) {
  std::int64_t blocks = 0;
  for (const Rows& tile : list.tiles) {
    ++blocks;
    for (std::size_t i = tile.begin; i < tile.end; ++i) {
      blocks += (keys_read(slices[list.meets[i]], tile.queries) + shape.block - 1) / shape.block;
    }
  }
  return static_cast<double>(blocks) * shape.block * shape.queries;
}

/// The tiles of one batch row.
struct RowTiles {
  std::vector<TileSlice> slices;
  TileList whole, cut;
};

std::vector<RowTiles> rows_of(std::span<const ForwardSegment> segments, std::int64_t batch,
                              std::int64_t seq_q, std::int32_t tile_queries) {
  std::vector<RowTiles> rows;
  for (std::int64_t b = 0; b < (differs_by_batch(segments) ? batch : 1); ++b) {
    RowTiles& row = rows.emplace_back();
    row.slices = slices_of(segments, b);
    row.whole = whole_tiles(row.slices, seq_q, tile_queries);
    row.cut = cut_tiles(row.slices, seq_q, tile_queries);
  }
  return rows;
}

struct TableCost {
  double pairs;
  bool cut;
};

TableCost table_cost(std::span<const RowTiles> rows, const TileShape& shape) {
  constexpr double kMost = 1.1;  // pieces of documents in a tile cost more than their pairs
  double whole = 0.0, cut = 0.0;
  for (const RowTiles& row : rows) {
    whole += cost(row.whole, row.slices, shape);
    cut += cost(row.cut, row.slices, shape);
  }
  return cut <= kMost * whole ? TableCost{cut, true} : TableCost{whole, false};
}

/// Appends the tiles of one batch row, each followed by copies of the slices that meet it. A tile
/// that was cut gets its own rows of them, or a slice without keys.
void add_entries(ForwardWork& work, const RowTiles& row, std::int32_t batch) {
  const TileList& list = work.rows_by_slice ? row.cut : row.whole;
  for (const Rows& tile : list.tiles) {
    const auto q_begin = static_cast<std::int32_t>(tile.queries.begin);
    const auto q_end = static_cast<std::int32_t>(tile.queries.end);
    const auto slice_begin = static_cast<std::int32_t>(work.slices.size());
    for (std::size_t i = tile.begin; i < tile.end; ++i) {
      TileSlice slice = row.slices[list.meets[i]];
      if (keys_read(slice, tile.queries) == 0) continue;
      if (work.rows_by_slice) {
        slice.q_begin = q_begin;
        slice.q_end = q_end;
      }
      work.slices.push_back(slice);
    }
    if (work.rows_by_slice && work.slices.size() == static_cast<std::size_t>(slice_begin)) {
      work.slices.push_back({q_begin, q_end, 0, 0, 0, 0, 0, 0});
    }
    work.entries.push_back(
        {q_begin, batch, slice_begin, static_cast<std::int32_t>(work.slices.size())});
  }
}

/// How many entries at the end of the order read at most a quarter of the first's keys.
template <typename KeysOf>
std::int32_t count_short(std::int32_t entries, const KeysOf& keys_of) {
  if (entries == 0) return 0;
  const std::int64_t limit = keys_of(0) / 4;
  std::int32_t count = 0;
  while (count < entries && keys_of(entries - 1 - count) <= limit) ++count;
  return count;
}

/// What all entries read, or 0 where they differ.
template <typename KeysOf>
std::int64_t equal_keys(std::int32_t entries, const KeysOf& keys_of) {
  for (std::int32_t i = 1; i < entries; ++i) {
    if (keys_of(i) != keys_of(0)) return 0;
  }
  return entries == 0 ? 0 : keys_of(0);
}

/// A stable order by keys read, so that the last tiles to start are the shortest (Graham, 1969).
void sort_longest_first(ForwardWork& work, std::int64_t seq_q, std::int32_t tile_queries) {
  std::vector<std::int64_t> keys;
  for (const TileEntry& entry : work.entries) {
    const auto slices = std::span(work.slices)
                            .subspan(static_cast<std::size_t>(entry.slice_begin),
                                     static_cast<std::size_t>(entry.slice_end - entry.slice_begin));
    const std::int64_t end = std::min<std::int64_t>(entry.q_begin + tile_queries, seq_q);
    keys.push_back(keys_read(slices, {entry.q_begin, end}));
  }
  std::vector<std::size_t> order(work.entries.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return keys[a] > keys[b]; });
  std::vector<TileEntry> sorted;
  for (const std::size_t i : order) sorted.push_back(work.entries[i]);
  work.entries = std::move(sorted);
  work.short_entries = count_short(
      work.rows(), [&](std::int32_t i) { return keys[order[static_cast<std::size_t>(i)]]; });
}

/// Pieces of equal length.
struct Pieces {
  std::int32_t count;
  double blocks;
};

/// Until all are done, where those that come first begin together.
double tail_blocks(const Pieces& first, const Pieces& others, std::int32_t multiprocessors) {
  double end = first.blocks;
  for (;;) {
    const double before = std::floor(end / others.blocks);
    const double after = std::floor((end - first.blocks) / others.blocks);
    if ((multiprocessors - first.count) * before + first.count * after >= others.count) return end;
    end = std::min((before + 1.0) * others.blocks, first.blocks + (after + 1.0) * others.blocks);
  }
}

bool needs_table(std::span<const ForwardSegment> segments) {
  return differs_by_batch(segments) || slices_of(segments, 0).size() > kInlineSlices;
}

}  // namespace

double computed_pairs(std::span<const ForwardSegment> segments, std::int64_t batch,
                      std::int64_t seq_q, const TileShape& tile) {
  if (needs_table(segments)) {
    return table_cost(rows_of(segments, batch, seq_q, tile.queries), tile).pairs;
  }
  std::int64_t blocks = 0;
  for (const TileSlice& slice : slices_of(segments, 0)) {
    const std::int64_t first = slice.q_begin / tile.queries * tile.queries;
    for (std::int64_t q = first; q < slice.q_end; q += tile.queries) {
      const std::int64_t keys = keys_read(slice, {q, std::min(q + tile.queries, seq_q)});
      blocks += (keys + tile.block - 1) / tile.block;
    }
  }
  return static_cast<double>(blocks) * tile.block * tile.queries;
}

TailCut cut_tail(std::int32_t tiles, std::int64_t blocks, std::int32_t multiprocessors) {
  // In blocks of keys: the ends of a tile; what a piece leaves behind; what each of them costs the
  // one that merges.
  constexpr double kEnds = 1.5, kPiece = 2.0, kMerge = 0.25;
  constexpr std::int32_t kMostPieces = 8;
  constexpr std::int64_t kShort = 16;  // blocks; shorter tiles were not measured
  constexpr double kWorthwhile = 0.99;
  const std::int32_t last = tiles % multiprocessors;
  const std::int32_t idle = multiprocessors - last;
  const double whole_blocks =
      static_cast<double>(tiles / multiprocessors) * (static_cast<double>(blocks) + kEnds);
  TailCut cut{tiles, 1};
  if (last == 0 || blocks < kShort) return cut;
  double best = (whole_blocks + static_cast<double>(blocks) + kEnds) * kWorthwhile;
  const auto consider = [&](std::int32_t pieces, std::int64_t longest, double ends) {
    const std::int64_t others = (blocks - longest + pieces - 2) / (pieces - 1);
    if (others <= 0 || others > longest) return;
    const double cost =
        whole_blocks + tail_blocks({last, static_cast<double>(longest) + ends},
                                   {last * (pieces - 1), static_cast<double>(others) + ends},
                                   multiprocessors);
    if (cost >= best) return;
    best = cost;
    cut = {tiles - last, pieces, static_cast<std::int32_t>(longest)};
  };
  for (std::int32_t pieces = 2; pieces <= kMostPieces; ++pieces) {
    const double ends = kEnds + kPiece + kMerge * pieces;
    const std::int32_t others = pieces - 1;
    consider(pieces, (blocks + others) / pieces, ends);
    // So many of the others take as long as the longest.
    const double turns = (last * others + idle - 1) / idle;
    const double longest = (static_cast<double>(blocks) + others * ends * (1.0 - 1.0 / turns)) /
                           (1.0 + others / turns);
    consider(pieces, static_cast<std::int64_t>(std::ceil(longest)), ends);
  }
  return cut;
}

ForwardWork plan_forward(std::span<const ForwardSegment> segments, std::int64_t batch,
                         std::int64_t seq_q, const TileShape& tile) {
  ForwardWork work;
  work.tiles = static_cast<std::int32_t>((seq_q + tile.queries - 1) / tile.queries);
  work.per_batch = differs_by_batch(segments);
  if (!needs_table(segments)) {
    work.slices = slices_of(segments, 0);
    const std::int64_t last = std::int64_t{work.tiles - 1} * tile.queries;
    work.last_tile_first = keys_read(work.slices, {last, last + tile.queries}) >=
                           keys_read(work.slices, {0, tile.queries});
    if (tile.short_first && work.last_tile_first) {
      work.missing_rows =
          static_cast<std::int32_t>(std::int64_t{work.tiles} * tile.queries - seq_q);
    }
    const auto keys_of = [&](std::int32_t i) {
      const std::int64_t q_begin =
          std::int64_t{work.last_tile_first ? work.tiles - 1 - i : i} * tile.queries -
          work.missing_rows;
      return keys_read(work.slices, {std::max<std::int64_t>(q_begin, 0),
                                     std::min(q_begin + tile.queries, seq_q)});
    };
    work.short_entries = count_short(work.tiles, keys_of);
    work.equal_keys = equal_keys(work.tiles, keys_of);
    return work;
  }
  const std::vector<RowTiles> rows = rows_of(segments, batch, seq_q, tile.queries);
  work.rows_by_slice = table_cost(rows, tile).cut;
  for (std::size_t b = 0; b < rows.size(); ++b) {
    add_entries(work, rows[b], work.per_batch ? static_cast<std::int32_t>(b) : -1);
  }
  sort_longest_first(work, seq_q, tile.queries);
  return work;
}

}  // namespace annulus::kernels::sm90
