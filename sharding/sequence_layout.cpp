#include "sharding/sequence_layout.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <queue>

#include "kernels/error.hpp"
#include "sharding/document_deal.hpp"
#include "sharding/named_sharding.hpp"

namespace annulus {
namespace {

using Chunk = SequenceLayout::Chunk;

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

void check(std::int64_t seq, int ranks) {
  require(seq >= 0 && ranks > 0, ExitCode::usage,
          "layout: {} rows over {} ranks; accepted: rows >= 0 and ranks >= 1", seq, ranks);
}

// Query area of each chunk of `chunk_rows` rows, all batch rows together.
std::vector<std::int64_t> chunk_areas(const MaskSlices& mask, std::int64_t batch, std::int64_t seq,
                                      std::int64_t chunk_rows) {
  std::vector<std::int64_t> area(index((seq + chunk_rows - 1) / chunk_rows), 0);
  const std::int64_t copies = mask.batch_offsets.empty() ? batch : 1;
  for (const Slice& slice : mask.slices) {
    for (std::int64_t c = slice.q.begin / chunk_rows; c * chunk_rows < slice.q.end; ++c) {
      const Span rows{c * chunk_rows, (c + 1) * chunk_rows};
      area[index(c)] += copies * clip(slice, rows, slice.k).area();
    }
  }
  return area;
}

struct Load {
  std::int64_t area = 0;
  int rank = 0;
  bool operator>(const Load& other) const {
    return area != other.area ? area > other.area : rank > other.rank;
  }
};

// Longest processing time first, with room for ceil(chunks / ranks) chunks a rank.
std::vector<int> deal(std::span<const std::int64_t> area, int ranks) {
  std::vector<std::size_t> order(area.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return area[a] > area[b]; });
  std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
  for (int rank = 0; rank < ranks; ++rank) loads.push({0, rank});
  const auto count = static_cast<std::int64_t>(area.size());
  const std::int64_t floor = count / ranks;
  std::int64_t with_one_more = count % ranks;
  std::vector<std::int64_t> held(index(ranks), 0);
  std::vector<int> rank_of(area.size(), 0);
  for (const std::size_t chunk : order) {
    Load least = loads.top();
    loads.pop();
    // A rank that is full for good leaves the heap.
    while (held[index(least.rank)] == floor && with_one_more == 0) {
      least = loads.top();
      loads.pop();
    }
    if (held[index(least.rank)] == floor) --with_one_more;
    rank_of[chunk] = least.rank;
    least.area += area[chunk];
    if (++held[index(least.rank)] <= floor) loads.push(least);
  }
  return rank_of;
}

double imbalance_of_deal(std::span<const std::int64_t> area, std::span<const int> rank_of,
                         int ranks) {
  std::vector<std::int64_t> sums(index(ranks), 0);
  for (std::size_t chunk = 0; chunk < area.size(); ++chunk) {
    sums[index(rank_of[chunk])] += area[chunk];
  }
  return imbalance(sums);
}

}  // namespace

void unite(std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(), [](Span a, Span b) { return a.begin < b.begin; });
  std::size_t kept = 0;
  for (const Span span : spans) {
    if (kept > 0 && span.begin <= spans[kept - 1].end) {
      spans[kept - 1].end = std::max(spans[kept - 1].end, span.end);
    } else {
      spans[kept++] = span;
    }
  }
  spans.resize(kept);
}

std::vector<PositionRun> positions_of(std::span<const RowRun> runs) {
  std::vector<PositionRun> positions;
  for (const RowRun& run : runs) positions.push_back({run.begin, run.global.begin});
  return positions;
}

SequenceLayout::SequenceLayout(int ranks, std::vector<Chunk> chunks) : rows_(index(ranks), 0) {
  for (const Chunk& chunk : chunks) {
    if (chunk.global.empty()) continue;
    std::int64_t& rows = rows_[index(chunk.rank)];
    if (!chunks_.empty() && chunks_.back().rank == chunk.rank) {
      chunks_.back().global.end = chunk.global.end;
    } else {
      chunks_.push_back({chunk.global, chunk.rank, rows});
    }
    rows += chunk.global.size();
    seq_ = chunk.global.end;
  }
  first_.assign(index(ranks) + 1, 0);
  for (const Chunk& chunk : chunks_) ++first_[index(chunk.rank) + 1];
  std::partial_sum(first_.begin(), first_.end(), first_.begin());
  std::vector<std::size_t> next(first_.begin(), first_.end() - 1);
  runs_.resize(chunks_.size());
  for (const Chunk& chunk : chunks_) {
    runs_[next[index(chunk.rank)]++] = {chunk.local_begin, chunk.global};
  }
}

SequenceLayout SequenceLayout::contiguous(std::int64_t seq, int ranks) {
  check(seq, ranks);
  std::vector<Chunk> chunks;
  for (int rank = 0; rank < ranks; ++rank)
    chunks.push_back({split_evenly(seq, ranks, rank), rank, 0});
  return {ranks, std::move(chunks)};
}

SequenceLayout SequenceLayout::contiguous(std::span<const std::int64_t> rows_of_rank) {
  std::vector<Chunk> chunks;
  std::int64_t next = 0;
  for (const std::int64_t rows : rows_of_rank) {
    require(rows >= 0, ExitCode::usage, "layout: rank {} holds {} rows; accepted: 0 or more",
            chunks.size(), rows);
    chunks.push_back({{next, next + rows}, static_cast<int>(chunks.size()), 0});
    next += rows;
  }
  check(next, static_cast<int>(rows_of_rank.size()));
  return {static_cast<int>(rows_of_rank.size()), std::move(chunks)};
}

SequenceLayout SequenceLayout::zigzag(std::int64_t seq, int ranks) {
  check(seq, ranks);
  std::vector<Chunk> chunks;
  for (int part = 0; part < 2 * ranks; ++part) {
    const int rank = part < ranks ? part : 2 * ranks - 1 - part;
    chunks.push_back({split_evenly(seq, 2 * std::int64_t{ranks}, part), rank, 0});
  }
  return {ranks, std::move(chunks)};
}

SequenceLayout SequenceLayout::balanced(const MaskSlices& mask, std::int64_t batch,
                                        std::int64_t seq, int ranks, std::int64_t chunk_rows) {
  check(seq, ranks);
  require(chunk_rows > 0, ExitCode::usage, "layout: chunks of {} rows; accepted: 1 or more",
          chunk_rows);
  const std::vector<int> rank_of = deal(chunk_areas(mask, batch, seq, chunk_rows), ranks);
  std::vector<Chunk> chunks;
  for (std::size_t c = 0; c < rank_of.size(); ++c) {
    const std::int64_t begin = static_cast<std::int64_t>(c) * chunk_rows;
    chunks.push_back({{begin, std::min(begin + chunk_rows, seq)}, rank_of[c], 0});
  }
  return {ranks, std::move(chunks)};
}

SequenceLayout SequenceLayout::balanced(const MaskSlices& mask, std::int64_t batch,
                                        std::int64_t seq, int ranks) {
  check(seq, ranks);
  if (std::optional<std::vector<Chunk>> chunks = deal_documents(mask, batch, seq, ranks)) {
    return {ranks, std::move(*chunks)};
  }
  // Chunks a rank: from two, which suffice for a causal triangle, to tiles of 64 rows.
  constexpr double kGood = 1.02;
  std::int64_t best_rows = 1;
  double best = std::numeric_limits<double>::infinity();
  for (std::int64_t parts = 2; parts <= 64; parts *= 2) {
    const std::int64_t rows =
        std::max<std::int64_t>((seq + ranks * parts - 1) / (ranks * parts), 1);
    if (rows < 64 && parts > 2) break;
    const std::vector<std::int64_t> area = chunk_areas(mask, batch, seq, rows);
    const double found = imbalance_of_deal(area, deal(area, ranks), ranks);
    if (found < best) {
      best = found;
      best_rows = rows;
    }
    if (best <= kGood) break;
  }
  return balanced(mask, batch, seq, ranks, best_rows);
}

std::int64_t SequenceLayout::max_rows() const {
  return rows_.empty() ? 0 : *std::max_element(rows_.begin(), rows_.end());
}

std::span<const Chunk> SequenceLayout::overlapping(Span global) const {
  if (global.empty()) return {};
  const auto first = std::partition_point(
      chunks_.begin(), chunks_.end(), [&](const Chunk& c) { return c.global.end <= global.begin; });
  const auto last = std::partition_point(
      first, chunks_.end(), [&](const Chunk& c) { return c.global.begin < global.end; });
  return {first, last};
}

std::span<const RowRun> SequenceLayout::runs(int rank) const {
  const std::size_t first = first_[index(rank)];
  return {runs_.data() + first, first_[index(rank) + 1] - first};
}

const Chunk& SequenceLayout::chunk_of(std::int64_t global_row) const {
  const auto found = overlapping({global_row, global_row + 1});
  require(!found.empty(), ExitCode::internal, "layout: row {} of {}", global_row, seq_);
  return found.front();
}

std::int64_t SequenceLayout::local_row(std::int64_t global_row) const {
  const Chunk& chunk = chunk_of(global_row);
  return chunk.local_begin + (global_row - chunk.global.begin);
}

std::int64_t SequenceLayout::global_row(int rank, std::int64_t local_row) const {
  const std::span<const RowRun> held = runs(rank);
  const auto after =
      std::upper_bound(held.begin(), held.end(), local_row,
                       [](std::int64_t row, const RowRun& run) { return row < run.begin; });
  require(after != held.begin() && local_row < rows(rank), ExitCode::internal,
          "layout: local row {} of {} on rank {}", local_row, rows(rank), rank);
  const RowRun& run = *(after - 1);
  return run.global.begin + (local_row - run.begin);
}

SequenceLayout SequenceLayout::grouped(int ranks_per_node) const {
  require(ranks_per_node > 0 && ranks() % ranks_per_node == 0, ExitCode::usage,
          "layout: {} ranks do not divide into nodes of {}", ranks(), ranks_per_node);
  std::vector<Chunk> chunks = chunks_;
  for (Chunk& chunk : chunks) chunk.rank /= ranks_per_node;
  return {ranks() / ranks_per_node, std::move(chunks)};
}

SequenceLayout SequenceLayout::aligned(std::int64_t block_rows) const {
  require(block_rows > 0, ExitCode::usage, "layout: blocks of {} rows; accepted: 1 or more",
          block_rows);
  std::vector<Chunk> chunks;
  for (std::int64_t begin = 0; begin < seq_; begin += block_rows) {
    chunks.push_back({{begin, std::min(begin + block_rows, seq_)}, rank_of(begin), 0});
  }
  return {ranks(), std::move(chunks)};
}

bool operator==(const SequenceLayout& a, const SequenceLayout& b) {
  const auto same = [](const Chunk& x, const Chunk& y) {
    return x.global == y.global && x.rank == y.rank;
  };
  return a.rows_ == b.rows_ &&
         std::equal(a.chunks_.begin(), a.chunks_.end(), b.chunks_.begin(), b.chunks_.end(), same);
}

std::vector<std::int64_t> areas(const SequenceLayout& q_layout, const MaskSlices& mask,
                                std::int64_t batch) {
  std::vector<std::int64_t> area(index(q_layout.ranks()), 0);
  const std::int64_t copies = mask.batch_offsets.empty() ? batch : 1;
  for (const Slice& slice : mask.slices) {
    for (const Chunk& chunk : q_layout.overlapping(slice.q)) {
      area[index(chunk.rank)] += copies * clip(slice, chunk.global, slice.k).area();
    }
  }
  return area;
}

double imbalance(std::span<const std::int64_t> areas) {
  if (areas.empty()) return 1.0;
  double sum = 0.0;
  for (const std::int64_t area : areas) sum += static_cast<double>(area);
  if (sum == 0.0) return 1.0;
  const auto most = static_cast<double>(*std::max_element(areas.begin(), areas.end()));
  return most * static_cast<double>(areas.size()) / sum;
}

}  // namespace annulus
