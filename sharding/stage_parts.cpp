#include "sharding/stage_parts.hpp"

#include <algorithm>

namespace annulus {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// The slices of `stage` over `rows`: of one batch row, or all lists when `batch` is every row.
MaskSlices slices_within(const Stage& stage, Span batch, std::int64_t batch_size, Span rows) {
  MaskSlices within;
  const bool by_batch = !stage.slices.batch_offsets.empty();
  const bool one_list = !by_batch || batch.size() < batch_size;
  for (std::int64_t b = batch.begin; b < (one_list ? batch.begin + 1 : batch.end); ++b) {
    if (!one_list) within.batch_offsets.push_back(static_cast<std::int64_t>(within.slices.size()));
    for (const Slice& slice : stage.slices.view().of_batch(b)) {
      Slice part = clip(slice, slice.q, rows);
      if (part.q.empty() || part.k.empty()) continue;
      part.k = {part.k.begin - rows.begin, part.k.end - rows.begin};
      part.band = part.band.shifted(0, rows.begin);
      within.slices.push_back(part);
    }
  }
  if (!one_list) within.batch_offsets.push_back(static_cast<std::int64_t>(within.slices.size()));
  return within;
}

class PartList {
 public:
  PartList(const Stage& stage, std::int64_t batch) : stage_(stage), batch_(batch) {}

  void add(Span batch, Span rows, std::span<const RowRun> runs) {
    StagePart part;
    part.slices = slices_within(stage_, batch, batch_, rows);
    if (part.slices.slices.empty()) return;
    part.batch = batch;
    part.rows = rows;
    for (const RowRun& run : runs) {
      const Span held = intersect(run.rows(), rows);
      if (held.empty()) continue;
      part.positions.push_back(
          {held.begin - rows.begin, run.global.begin + (held.begin - run.begin)});
    }
    if (!part.positions.empty()) part.column_begin = part.positions.front().global_begin;
    parts_.push_back(std::move(part));
  }

  // The batch rows that list `list` of runs or slices serves.
  Span batch_of(std::size_t list, std::size_t lists) const {
    const auto b = static_cast<std::int64_t>(list);
    return lists == 1 ? Span{0, batch_} : Span{b, b + 1};
  }

  void add_blocks(std::int64_t block_rows) {
    // Batch rows with masks of their own are kept apart, also where all have the same rows.
    const std::size_t lists =
        stage_.slices.batch_offsets.empty() ? 1 : stage_.slices.batch_offsets.size() - 1;
    for (std::size_t list = 0; list < lists && !stage_.runs.empty(); ++list) {
      for (const RowRun& run : stage_.runs[stage_.runs.size() == 1 ? 0 : list]) {
        for (std::int64_t begin = run.global.begin; begin < run.global.end;) {
          const std::int64_t end = std::min((begin / block_rows + 1) * block_rows, run.global.end);
          const std::int64_t row = run.begin + (begin - run.global.begin);
          add(batch_of(list, lists), {row, row + (end - begin)}, {&run, 1});
          begin = end;
        }
      }
    }
  }

  void add_pieces() {
    for (const Transfer& transfer : stage_.receives) {
      for (const Piece& piece : transfer.pieces) {
        const bool every = piece.batch == Piece::kEveryBatch;
        const std::size_t list = every ? 0 : index(piece.batch);
        const std::size_t before = parts_.size();
        add(every ? Span{0, batch_} : Span{piece.batch, piece.batch + 1},
            {piece.buffer_begin, piece.buffer_begin + piece.rows.size()}, stage_.runs[list]);
        if (parts_.size() == before) continue;
        parts_.back().peer = transfer.peer;
        parts_.back().peer_row = piece.rows.begin;
      }
    }
  }

  std::vector<StagePart> take() { return std::move(parts_); }

 private:
  const Stage& stage_;
  std::int64_t batch_;
  std::vector<StagePart> parts_;
};

}  // namespace

Span query_rows(const StagePart& part) {
  Span rows = part.slices.slices.front().q;
  for (const Slice& slice : part.slices.slices) {
    rows = {std::min(rows.begin, slice.q.begin), std::max(rows.end, slice.q.end)};
  }
  return rows;
}

std::vector<PositionRun> positions_within(std::span<const PositionRun> runs, Span rows) {
  std::vector<PositionRun> within;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const std::int64_t end = i + 1 < runs.size() ? runs[i + 1].local_begin : rows.end;
    const std::int64_t begin = std::max(runs[i].local_begin, rows.begin);
    if (begin >= std::min(end, rows.end)) continue;
    within.push_back({begin - rows.begin, runs[i].global_begin + (begin - runs[i].local_begin)});
  }
  return within;
}

StagePart part_within(const StagePart& part, Span q, Span k) {
  StagePart within;
  within.batch = part.batch;
  within.rows = {part.rows.begin + k.begin, part.rows.begin + k.end};
  within.positions = positions_within(part.positions, k);
  within.column_begin = within.positions.empty() ? 0 : within.positions.front().global_begin;
  const bool by_batch = !part.slices.batch_offsets.empty();
  const std::int64_t lists =
      by_batch ? static_cast<std::int64_t>(part.slices.batch_offsets.size()) - 1 : 1;
  for (std::int64_t list = 0; list < lists; ++list) {
    if (by_batch) {
      within.slices.batch_offsets.push_back(static_cast<std::int64_t>(within.slices.slices.size()));
    }
    for (const Slice& slice : part.slices.view().of_batch(list)) {
      Slice seen = clip(slice, q, k);
      if (seen.q.empty() || seen.k.empty()) continue;
      seen.q = {seen.q.begin - q.begin, seen.q.end - q.begin};
      seen.k = {seen.k.begin - k.begin, seen.k.end - k.begin};
      seen.band = seen.band.shifted(q.begin, k.begin);
      within.slices.slices.push_back(seen);
    }
  }
  if (by_batch) {
    within.slices.batch_offsets.push_back(static_cast<std::int64_t>(within.slices.slices.size()));
  }
  return within;
}

bool few_pieces(const Stage& stage) {
  constexpr std::size_t kMost = 4;
  std::size_t pieces = 0;
  for (const Transfer& transfer : stage.receives) pieces += transfer.pieces.size();
  return pieces <= kMost;
}

bool few_slices(const AttentionPlan& plan) {
  if (plan.scheme() == Scheme::all_gather || plan.request().block_rows > 0) return false;
  std::size_t slices = 0;
  for (const Stage& stage : plan.stages()) slices += stage.slices.slices.size();
  const std::size_t most = 16 + 4 * index(plan.groups());
  const std::size_t lists = std::max<std::size_t>(plan.request().mask.batch_offsets.size(), 2) - 1;
  return slices <= most * lists;
}

bool joins_stages(const AttentionPlan& plan) {
  bool receives = false;
  for (const Stage& stage : plan.stages()) {
    receives = receives || (stage.number > 0 && !stage.receives.empty());
  }
  return receives && few_slices(plan);
}

std::vector<StagePart> parts_of(const Stage& stage, std::int64_t batch, Granularity granularity,
                                std::int64_t block_rows) {
  PartList parts(stage, batch);
  const Span all{0, stage.buffer_rows};
  const std::size_t lists = stage.runs.size();
  switch (granularity) {
    case Granularity::block:
      parts.add_blocks(block_rows);
      break;
    case Granularity::piece:
      parts.add_pieces();
      break;
    case Granularity::run:
      for (std::size_t list = 0; list < lists; ++list) {
        for (const RowRun& run : stage.runs[list]) {
          parts.add(parts.batch_of(list, lists), run.rows(), {&run, 1});
        }
      }
      break;
    case Granularity::positions:
      for (std::size_t list = 0; list < lists; ++list) {
        parts.add(parts.batch_of(list, lists), all, stage.runs[list]);
      }
      break;
    case Granularity::stage:
      // Positions of the first list: only asked for where no call needs them.
      if (lists > 0) parts.add({0, batch}, all, stage.runs.front());
      break;
  }
  return parts.take();
}

}  // namespace annulus
