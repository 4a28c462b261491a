#include "kernels/sm90/forward_work.hpp"

#include <algorithm>
#include <numeric>

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

/// Appends the tiles of one batch row, each followed by copies of the slices that meet it.
void add_entries(ForwardWork& work, std::span<const TileSlice> slices, std::int32_t batch,
                 std::int64_t seq_q, std::int32_t tile_queries) {
  std::vector<std::vector<std::size_t>> meets(static_cast<std::size_t>(work.tiles));
  for (std::size_t i = 0; i < slices.size(); ++i) {
    const auto first = static_cast<std::size_t>(slices[i].q_begin / tile_queries);
    const auto last = static_cast<std::size_t>((slices[i].q_end - 1) / tile_queries);
    for (std::size_t tile = first; tile <= last; ++tile) meets[tile].push_back(i);
  }
  for (std::int32_t tile = 0; tile < work.tiles; ++tile) {
    const std::int32_t q_begin = tile * tile_queries;
    const Span queries{q_begin, std::min<std::int64_t>(q_begin + tile_queries, seq_q)};
    const auto slice_begin = static_cast<std::int32_t>(work.slices.size());
    for (const std::size_t i : meets[static_cast<std::size_t>(tile)]) {
      if (keys_read(slices[i], queries) > 0) work.slices.push_back(slices[i]);
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

}  // namespace

double computed_pairs(std::span<const ForwardSegment> segments, std::int64_t batch,
                      std::int64_t seq_q, std::int32_t tile_queries, std::int32_t block) {
  const std::int64_t rows = differs_by_batch(segments) ? batch : 1;
  std::int64_t blocks = 0;
  for (std::int64_t b = 0; b < rows; ++b) {
    for (const TileSlice& slice : slices_of(segments, b)) {
      const std::int64_t first = slice.q_begin / tile_queries * tile_queries;
      for (std::int64_t q = first; q < slice.q_end; q += tile_queries) {
        const std::int64_t keys = keys_read(slice, {q, std::min(q + tile_queries, seq_q)});
        blocks += (keys + block - 1) / block;
      }
    }
  }
  return static_cast<double>(blocks) * block * tile_queries;
}

TailCut cut_tail(std::int32_t tiles, std::int64_t blocks, std::int32_t multiprocessors) {
  // In blocks of keys: the ends of a tile; what a piece leaves behind; what each of them costs the
  // one that merges.
  constexpr double kEnds = 1.5, kPiece = 4.0, kMerge = 0.5;
  constexpr std::int32_t kMostPieces = 8;
  constexpr double kWorthwhile = 0.99;
  const std::int32_t last = tiles % multiprocessors;
  const double whole_blocks =
      static_cast<double>(tiles / multiprocessors) * (static_cast<double>(blocks) + kEnds);
  const auto cost = [&](std::int32_t pieces) {
    const std::int32_t turns = (last * pieces + multiprocessors - 1) / multiprocessors;
    const std::int64_t longest = (blocks + pieces - 1) / pieces;
    const double merging = pieces == 1 ? 0.0 : kPiece + kMerge * pieces;
    return whole_blocks + turns * (static_cast<double>(longest) + kEnds + merging);
  };
  TailCut cut{tiles, 1};
  double best = cost(1) * kWorthwhile;
  for (std::int32_t pieces = 2; pieces <= kMostPieces; ++pieces) {
    if (cost(pieces) >= best) continue;
    best = cost(pieces);
    cut = {tiles - last, pieces};
  }
  return cut;
}

ForwardWork plan_forward(std::span<const ForwardSegment> segments, std::int64_t batch,
                         std::int64_t seq_q, std::int32_t tile_queries) {
  ForwardWork work;
  work.tiles = static_cast<std::int32_t>((seq_q + tile_queries - 1) / tile_queries);
  work.per_batch = differs_by_batch(segments);
  const std::vector<TileSlice> shared =
      work.per_batch ? std::vector<TileSlice>{} : slices_of(segments, 0);
  if (!work.per_batch && shared.size() <= kInlineSlices) {
    work.slices = shared;
    const std::int64_t last = std::int64_t{work.tiles - 1} * tile_queries;
    work.last_tile_first =
        keys_read(shared, {last, last + tile_queries}) >= keys_read(shared, {0, tile_queries});
    const auto keys_of = [&](std::int32_t i) {
      const std::int64_t q_begin =
          std::int64_t{work.last_tile_first ? work.tiles - 1 - i : i} * tile_queries;
      return keys_read(shared, {q_begin, std::min(q_begin + tile_queries, seq_q)});
    };
    work.short_entries = count_short(work.tiles, keys_of);
    work.equal_keys = equal_keys(work.tiles, keys_of);
    return work;
  }
  for (std::int32_t b = 0; b < (work.per_batch ? batch : 1); ++b) {
    add_entries(work, work.per_batch ? slices_of(segments, b) : shared, work.per_batch ? b : -1,
                seq_q, tile_queries);
  }
  sort_longest_first(work, seq_q, tile_queries);
  return work;
}

}  // namespace annulus::kernels::sm90
