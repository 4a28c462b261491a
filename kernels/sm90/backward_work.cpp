#include "kernels/sm90/backward_work.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace annulus::kernels::sm90 {
namespace {

constexpr std::int64_t kBandLimit = std::int64_t{1} << 30;

std::int32_t clamp_band(std::int64_t bound) {
  return static_cast<std::int32_t>(std::clamp(bound, -kBandLimit, kBandLimit));
}

/// Queries of the slice that see some key of the block.
std::int64_t queries_met(const TileSlice& slice, std::int64_t k_begin, std::int64_t k_end) {
  const std::int64_t begin = std::max<std::int64_t>(slice.q_begin, k_begin - slice.hi);
  const std::int64_t end = std::min<std::int64_t>(slice.q_end, k_end - slice.lo);
  return std::max<std::int64_t>(end - begin, 0);
}

/// Blocks of queries of the slice that see some key of the block.
std::int64_t blocks_met(const TileSlice& slice, std::int32_t k_begin, std::int32_t block_keys,
                        std::int32_t queries) {
  const std::int32_t k_end = std::min(k_begin + block_keys, slice.k_end);
  return (queries_met(slice, k_begin, k_end) + queries - 1) / queries;
}

std::int64_t blocks_of_entry(const ForwardWork& work, const TileEntry& entry,
                             std::int32_t block_keys, std::int32_t queries) {
  std::int64_t blocks = 0;
  for (std::int32_t i = entry.slice_begin; i < entry.slice_end; ++i) {
    const TileSlice& slice = work.slices[static_cast<std::size_t>(i)];
    blocks += blocks_met(slice, entry.q_begin, block_keys, queries);
  }
  return blocks;
}

/// When the last of `pieces` jobs of length `piece` is done, which workers take as soon as they
/// have done the `tiles` jobs of length `whole` before.
double end_of_pieces(std::int64_t tiles, double whole, std::int64_t pieces, double piece,
                     std::int64_t workers) {
  const double early = static_cast<double>(tiles / workers) * whole;
  const std::int64_t late_workers = tiles % workers;
  const double late = late_workers > 0 ? early + whole : early;
  if (pieces == 0) return late;
  const auto done = [&](double since) { return std::max(std::floor(since / piece + 1e-6), 0.0); };
  const auto enough = [&](double end) {
    return static_cast<double>(workers - late_workers) * done(end - early) +
               static_cast<double>(late_workers) * done(end - late) >=
           static_cast<double>(pieces);
  };
  double end = early + std::max(1.0, std::floor(static_cast<double>(pieces / workers))) * piece;
  while (!enough(end)) {
    const double next_early = early + (done(end - early) + 1.0) * piece;
    end = std::min(next_early, late + (done(end - late) + 1.0) * piece);
  }
  return std::max(end, late);
}

/// Slices by the run of keys [begin, end) between two bounds that they cover.
TileSlice slice_of_run(const Slice& slice, std::int64_t begin, std::int64_t end) {
  return {static_cast<std::int32_t>(slice.q.begin),
          static_cast<std::int32_t>(slice.q.end),
          static_cast<std::int32_t>(begin),
          static_cast<std::int32_t>(end),
          clamp_band(slice.band.lo),
          clamp_band(slice.band.hi),
          0,
          0};
}

class Planner {
 public:
  explicit Planner(std::int32_t block_keys) : block_keys_(block_keys) {}

  void add_batch_row(std::span<const Slice> slices, std::int32_t batch) {
    const std::size_t first = work_.slices.size();
    std::vector<const Slice*> by_begin;
    std::vector<std::int64_t> bounds;
    for (const Slice& slice : slices) {
      if (slice.q.empty() || slice.k.empty() || slice.band.lo > slice.band.hi) continue;
      by_begin.push_back(&slice);
      bounds.push_back(slice.k.begin);
      bounds.push_back(slice.k.end);
    }
    std::stable_sort(by_begin.begin(), by_begin.end(),
                     [](const Slice* a, const Slice* b) { return a->k.begin < b->k.begin; });
    std::sort(bounds.begin(), bounds.end());
    bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());

    std::vector<const Slice*> covering;
    auto next = by_begin.begin();
    for (std::size_t i = 0; i + 1 < bounds.size(); ++i) {
      std::erase_if(covering, [&](const Slice* slice) { return slice->k.end <= bounds[i]; });
      for (; next != by_begin.end() && (*next)->k.begin == bounds[i]; ++next) {
        covering.push_back(*next);
      }
      if (!covering.empty()) add_run(covering, bounds[i], bounds[i + 1], batch);
    }
    for (std::size_t i = first; i < work_.slices.size(); ++i) {
      work_.slices[i].batch_begin = static_cast<std::int32_t>(first);
    }
  }

  ForwardWork ordered(BlockOrder wanted) {
    std::vector<std::int64_t> most(work_.slices.size());  // queries of a block, by its first slice
    const auto most_of_run = [&](std::size_t i) -> std::int64_t& {
      return most[static_cast<std::size_t>(work_.entries[i].slice_begin)];
    };
    std::vector<std::size_t> order(work_.entries.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (const std::size_t i : order) most_of_run(i) = std::max(most_of_run(i), queries_[i]);
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      const TileEntry& left = work_.entries[a];
      const TileEntry& right = work_.entries[b];
      if (wanted == BlockOrder::first_keys_first) return left.q_begin < right.q_begin;
      if (left.slice_begin == right.slice_begin) return queries_[a] > queries_[b];
      if (most_of_run(a) != most_of_run(b)) return most_of_run(a) > most_of_run(b);
      return left.slice_begin < right.slice_begin;
    });
    std::vector<TileEntry> sorted;
    for (const std::size_t i : order) sorted.push_back(work_.entries[i]);
    work_.entries = std::move(sorted);
    return std::move(work_);
  }

 private:
  void add_run(std::span<const Slice* const> covering, std::int64_t begin, std::int64_t end,
               std::int32_t batch) {
    const auto slice_begin = static_cast<std::int32_t>(work_.slices.size());
    for (const Slice* slice : covering) work_.slices.push_back(slice_of_run(*slice, begin, end));
    const auto slice_end = static_cast<std::int32_t>(work_.slices.size());
    for (std::int64_t k = begin; k < end; k += block_keys_) {
      std::int64_t queries = 0;
      for (std::int32_t i = slice_begin; i < slice_end; ++i) {
        queries += queries_met(work_.slices[static_cast<std::size_t>(i)], k,
                               std::min(k + block_keys_, end));
      }
      if (queries == 0) continue;
      work_.entries.push_back({static_cast<std::int32_t>(k), batch, slice_begin, slice_end});
      queries_.push_back(queries);
    }
  }

  std::int32_t block_keys_;
  ForwardWork work_;
  std::vector<std::int64_t> queries_;  // of each entry
};

}  // namespace

ForwardWork plan_backward(const SliceList& mask, std::int64_t batch, std::int32_t block_keys,
                          BlockOrder order) {
  Planner planner(block_keys);
  const bool per_batch = !mask.batch_offsets.empty();
  for (std::int64_t b = 0; b < (per_batch ? batch : 1); ++b) {
    planner.add_batch_row(mask.of_batch(b), per_batch ? static_cast<std::int32_t>(b) : -1);
  }
  ForwardWork work = planner.ordered(order);
  work.per_batch = per_batch;
  return work;
}

std::int64_t blocks_of_queries(const ForwardWork& work, std::int32_t block_keys,
                               std::int32_t queries) {
  std::int64_t blocks = 0;
  for (const TileEntry& entry : work.entries) {
    blocks += blocks_of_entry(work, entry, block_keys, queries);
  }
  return blocks;
}

std::int64_t most_blocks_of_queries(const ForwardWork& work, std::int32_t block_keys,
                                    std::int32_t queries) {
  std::int64_t most = 0;
  for (const TileEntry& entry : work.entries) {
    most = std::max(most, blocks_of_entry(work, entry, block_keys, queries));
  }
  return most;
}

std::int64_t equal_blocks(const ForwardWork& work, std::int32_t block_keys, std::int32_t queries) {
  std::int64_t equal = 0;
  for (const TileEntry& entry : work.entries) {
    const TileSlice& slice = work.slices[static_cast<std::size_t>(entry.slice_begin)];
    const std::int64_t blocks = blocks_met(slice, entry.q_begin, block_keys, queries);
    if (entry.slice_end - entry.slice_begin != 1 || (equal != 0 && blocks != equal)) return 0;
    equal = blocks;
  }
  return equal;
}

TailCut cut_last_keys(const ForwardWork& work, std::int32_t units, std::int32_t last_units,
                      std::int32_t block_keys, std::int32_t queries, std::int32_t processors) {
  constexpr double ends = 2.0;        // of a pass, in blocks of queries
  constexpr double least_gain = .02;  // less was lost again, to passes that no longer keep together
  constexpr std::int64_t most_pieces = 16;
  const std::int64_t blocks = equal_blocks(work, block_keys, queries);
  const std::int32_t entries = work.rows();
  const std::int64_t tickets = std::int64_t{entries} * units;
  const double whole = static_cast<double>(blocks) + ends;
  TailCut best{entries, 1};
  double least = end_of_pieces(tickets, whole, 0, whole, processors) * (1.0 - least_gain);
  const std::int32_t most_cut = std::min(entries, 2 * processors / last_units + 1);
  for (std::int32_t cut = 1; cut <= most_cut; ++cut) {
    for (std::int64_t pieces = 2; pieces <= std::min(blocks, most_pieces); ++pieces) {
      const std::int64_t length = (blocks + pieces - 1) / pieces;
      if ((pieces - 1) * length >= blocks) continue;  // one less would do
      const std::int64_t last = std::int64_t{cut} * last_units;
      const std::int64_t earlier = std::int64_t{cut} * (units - last_units);
      const double end = end_of_pieces(tickets - last, whole, last * pieces,
                                       static_cast<double>(length) + ends, processors) +
                         static_cast<double>(earlier * (pieces - 1)) * ends / processors;
      if (end >= least) continue;
      least = end;
      best = {entries - cut, static_cast<std::int32_t>(pieces)};
    }
  }
  return best;
}

void cut_entries(ForwardWork& work, const TailCut& cut, std::int32_t block_keys,
                 std::int32_t queries) {
  const std::vector<TileEntry> last(work.entries.begin() + cut.whole, work.entries.end());
  work.entries.resize(static_cast<std::size_t>(cut.whole));
  for (std::int32_t piece = 0; piece < cut.pieces; ++piece) {
    for (const TileEntry& entry : last) {
      TileSlice slice = work.slices[static_cast<std::size_t>(entry.slice_begin)];
      const std::int32_t k_end = std::min(entry.q_begin + block_keys, slice.k_end);
      const std::int64_t blocks = blocks_met(slice, entry.q_begin, block_keys, queries);
      const auto length = static_cast<std::int32_t>((blocks + cut.pieces - 1) / cut.pieces);
      const std::int32_t begin =
          std::max(slice.q_begin, entry.q_begin - slice.hi) + piece * length * queries;
      slice.q_end = std::min({slice.q_end, k_end - slice.lo, begin + length * queries});
      slice.q_begin = begin;
      const auto at = static_cast<std::int32_t>(work.slices.size());
      work.slices.push_back(slice);
      work.entries.push_back({entry.q_begin, entry.batch, at, at + 1});
    }
  }
}

std::int64_t keys_together(std::int64_t pass_rows, std::int64_t row_bytes) {
  if (pass_rows > kLongPassRows) return pass_rows / 8;
  if (row_bytes < kDriftBytes || pass_rows < 1024) return kFewKeysTogether;
  return pass_rows < 4096 ? 1024 : 2048;
}

bool covers_all_keys(const ForwardWork& work, std::int64_t batch, std::int64_t seq_kv,
                     std::int32_t block_keys, std::int32_t box) {
  std::int64_t covered = 0;
  for (const TileEntry& entry : work.entries) {
    const std::int32_t run_end = work.slices[static_cast<std::size_t>(entry.slice_begin)].k_end;
    const std::int32_t end = std::min(entry.q_begin + block_keys, run_end);
    if ((end - entry.q_begin) % box != 0 && end != seq_kv) return false;
    covered += end - entry.q_begin;
  }
  return covered == seq_kv * (work.per_batch ? batch : 1);
}

}  // namespace annulus::kernels::sm90
