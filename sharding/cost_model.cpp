#include "sharding/cost_model.hpp"

#include <algorithm>

namespace annulus {
namespace {

using Chunk = SequenceLayout::Chunk;

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// Counts readers of KV chunks: whole ones by differences over the chunk index, cut ones one by one.
class ReaderCount {
 public:
  explicit ReaderCount(const SequenceLayout& kv) : kv_(kv), change_(kv.chunks().size() + 1, 0) {}

  void add(Span rows, std::int64_t copies, std::vector<std::int64_t>& sent) {
    const std::span<const Chunk> chunks = kv_.overlapping(rows);
    if (chunks.empty()) return;
    const auto first = chunks.data() - kv_.chunks().data();
    const auto count = static_cast<std::ptrdiff_t>(chunks.size());
    change_[static_cast<std::size_t>(first)] += copies;
    change_[static_cast<std::size_t>(first + count)] -= copies;
    const std::int64_t before = rows.begin - chunks.front().global.begin;
    const std::int64_t after = chunks.back().global.end - rows.end;
    sent[index(chunks.front().rank)] -= copies * before;
    sent[index(chunks.back().rank)] -= copies * after;
  }

  void finish(std::vector<std::int64_t>& sent) const {
    std::int64_t readers = 0;
    for (std::size_t c = 0; c < kv_.chunks().size(); ++c) {
      readers += change_[c];
      const Chunk& chunk = kv_.chunks()[c];
      sent[index(chunk.rank)] += readers * chunk.global.size();
    }
  }

 private:
  const SequenceLayout& kv_;
  std::vector<std::int64_t> change_;
};

std::int64_t own_rows_within(const SequenceLayout& kv, int rank, const std::vector<Span>& spans) {
  std::int64_t rows = 0;
  auto span = spans.begin();
  for (const RowRun& run : kv.runs(rank)) {
    while (span != spans.end() && span->end <= run.global.begin) ++span;
    for (auto it = span; it != spans.end() && it->begin < run.global.end; ++it) {
      rows += intersect(*it, run.global).size();
    }
  }
  return rows;
}

// Tiles of `tile_rows` queries, which begin at multiples of them, over blocks of `block_rows` keys.
TileWork work_of_tiles(const Slice& slice, std::int64_t tile_rows, std::int64_t block_rows) {
  const Span seeing =
      intersect(slice.q, {slice.k.begin - slice.band.hi, slice.k.end - slice.band.lo});
  if (seeing.empty() || slice.k.empty()) return {};
  if (tile_rows <= 1) return {slice.area(), seeing.size()};
  TileWork work;
  for (std::int64_t begin = seeing.begin / tile_rows * tile_rows; begin < seeing.end;
       begin += tile_rows) {
    const Span queries = intersect(seeing, {begin, begin + tile_rows});
    const Span keys =
        intersect(slice.k, {queries.begin + slice.band.lo, queries.end + slice.band.hi});
    if (keys.empty()) continue;
    ++work.tiles;
    work.pairs += (keys.size() + block_rows - 1) / block_rows * block_rows * tile_rows;
  }
  return work;
}

std::int64_t total(const std::vector<Span>& spans) {
  std::int64_t rows = 0;
  for (const Span span : spans) rows += span.size();
  return rows;
}

}  // namespace

Rates default_rates(Device device) {
  Rates rates;
  if (device == Device::cpu) {
    rates.reads_in_place = true;
    rates.hides_node_transfers = false;
    rates.node_ranks = 1 << 20;
    return rates;
  }
  rates.tile_rows = 128;
  rates.forward_flops = 7.2e14;
  rates.backward_flops = 5.5e14;
  rates.forward_tile_seconds = 1.1e-8;
  rates.backward_tile_seconds = 8e-8;
  rates.copy_bandwidth = 1.15e12;
  rates.node_bandwidth = 2.5e11;
  rates.network_bandwidth = 4.5e10;
  rates.latency_seconds = 1e-5;
  rates.call_seconds = 2.3e-5;
  rates.node_ranks = 8;
  rates.one_launch = true;
  return rates;
}

double forward_flops(std::int64_t area, const AttentionSizes& sizes) {
  return 2.0 * static_cast<double>(area) * static_cast<double>(sizes.head_dim + sizes.value_dim);
}

double backward_flops(std::int64_t area, const AttentionSizes& sizes) {
  return 2.0 * static_cast<double>(area) *
         static_cast<double>(3 * sizes.head_dim + 2 * sizes.value_dim);
}

TileWork tile_work(const Slice& slice, std::int64_t tile_rows) {
  return work_of_tiles(slice, tile_rows, tile_rows);
}

TileWork backward_tile_work(const Slice& slice, std::int64_t tile_rows) {
  if (tile_rows <= 1) return tile_work(slice, tile_rows);
  const Band turned{-slice.band.hi, -slice.band.lo};
  return work_of_tiles({{0, slice.k.size()}, slice.q, turned.shifted(slice.k.begin, 0)}, tile_rows,
                       std::max<std::int64_t>(tile_rows * 5 / 8, 1));
}

GroupShares group_shares(const SequenceLayout& q_layout, const SequenceLayout& kv_layout,
                         const MaskSlices& mask, std::int64_t batch, int node_groups) {
  const std::size_t ranks = index(q_layout.ranks());
  const std::vector<std::int64_t> none(ranks, 0);
  GroupShares shares{areas(q_layout, mask, batch), none, none, none};
  ReaderCount readers(kv_layout);
  const bool by_batch = !mask.batch_offsets.empty();
  const std::int64_t copies = by_batch ? 1 : batch;
  for (std::int64_t list = 0; list < (by_batch ? batch : 1); ++list) {
    std::vector<std::vector<Span>> needs(ranks);
    for (const Slice& slice : mask.view().of_batch(list)) {
      for (const Chunk& chunk : q_layout.overlapping(slice.q)) {
        const Slice part = clip(slice, chunk.global, slice.k);
        if (!part.q.empty() && !part.k.empty()) needs[index(chunk.rank)].push_back(part.k);
      }
    }
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      unite(needs[rank]);
      for (const Span span : needs[rank]) readers.add(span, copies, shares.rows_sent);
      const std::int64_t own = own_rows_within(kv_layout, static_cast<int>(rank), needs[rank]);
      shares.rows_received[rank] += copies * (total(needs[rank]) - own);
      shares.rows_from_network[rank] += copies * total(needs[rank]);
      const int node = static_cast<int>(rank) / node_groups * node_groups;
      for (int near = node; near < std::min(node + node_groups, q_layout.ranks()); ++near) {
        shares.rows_from_network[rank] -= copies * own_rows_within(kv_layout, near, needs[rank]);
      }
      shares.rows_sent[rank] -= copies * own;
    }
  }
  readers.finish(shares.rows_sent);
  return shares;
}

}  // namespace annulus
