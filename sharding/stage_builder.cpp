#include "sharding/stage_builder.hpp"

#include <algorithm>
#include <map>
#include <numeric>

#include "sharding/join_rectangles.hpp"

namespace annulus {
namespace {

using Chunk = SequenceLayout::Chunk;
using Spans = std::vector<Span>;

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// Stage of each distance: farthest round the ring first, neighbours sharing a stage where their
// rows are few.
std::vector<int> number_distances(int ranks, std::int64_t max_rows, const StageRules& rules) {
  std::vector<int> number(index(ranks), ranks > 1 && rules.one_stage ? 1 : 0);
  if (rules.one_stage) return number;
  std::vector<int> order(index(ranks) - 1);
  std::iota(order.begin(), order.end(), 1);
  std::stable_sort(order.begin(), order.end(), [ranks](int a, int b) {
    return std::min(a, ranks - a) > std::min(b, ranks - b);
  });
  const std::int64_t together =
      std::max<std::int64_t>(rules.stage_rows / std::max<std::int64_t>(max_rows, 1), 1);
  for (std::size_t i = 0; i < order.size(); ++i) {
    number[index(order[i])] = 1 + static_cast<int>(static_cast<std::int64_t>(i) / together);
  }
  return number;
}

// The runs that share positions with `global`; runs are in global order.
std::span<const RowRun> overlapping(std::span<const RowRun> runs, Span global) {
  if (global.empty()) return {};
  const auto first = std::partition_point(
      runs.begin(), runs.end(), [&](const RowRun& run) { return run.global.end <= global.begin; });
  const auto last = std::partition_point(
      first, runs.end(), [&](const RowRun& run) { return run.global.begin < global.end; });
  return {first, last};
}

class StageBuilder {
 public:
  StageBuilder(const SequenceLayout& q_layout, const SequenceLayout& kv_layout,
               const MaskSlices& mask, int rank, const StageRules& rules)
      : q_layout_(q_layout),
        kv_layout_(kv_layout),
        mask_(mask),
        rank_(rank),
        rules_(rules),
        lists_(mask.batch_offsets.empty() ? 1 : mask.batch_offsets.size() - 1),
        number_(number_distances(q_layout.ranks(), kv_layout.max_rows(), rules)) {}

  std::vector<Stage> build() {
    collect_receives();
    collect_sends();
    if (!rules_.one_stage || q_layout_.ranks() == 1) add_local_stage();
    for (auto& [number, needs] : needs_) add_receives(stages_[number], needs);
    for (auto& [key, spans] : offers_) add_sends(key, spans);
    std::vector<Stage> stages;
    for (auto& [number, stage] : stages_) {
      stage.number = number;
      stage.slices = localize(mine_, q_layout_.runs(rank_), stage.runs);
      // The bits of blocks depend on where slices begin.
      if (rules_.block_rows == 0) stage.slices = join_rectangles(stage.slices);
      stages.push_back(std::move(stage));
    }
    return stages;
  }

 private:
  using SpansOfLists = std::vector<Spans>;
  struct OfferKey {
    int number, peer;
    auto operator<=>(const OfferKey&) const = default;
  };

  Span round_out(Span k) const {
    const std::int64_t block = rules_.block_rows;
    if (block == 0 || k.empty()) return k;
    return {k.begin / block * block,
            std::min((k.end + block - 1) / block * block, kv_layout_.seq())};
  }

  int number_of(int reader, int owner) const {
    const int ranks = q_layout_.ranks();
    return number_[index((reader - owner + ranks) % ranks)];
  }

  // A block that a rank does not hold whole comes with the rows of its first other owner.
  int home_of_block(int reader, Span block) const {
    const std::span<const Chunk> chunks = kv_layout_.overlapping(block);
    for (const Chunk& chunk : chunks) {
      if (chunk.rank != reader) return chunk.rank;
    }
    return reader;
  }

  // Calls emit(stage number, owner, rows) for the KV rows `k` that `reader` needs.
  template <typename Emit>
  void for_each_part(int reader, Span k, Emit emit) const {
    if (rules_.block_rows == 0) {
      for (const Chunk& chunk : kv_layout_.overlapping(k)) {
        emit(number_of(reader, chunk.rank), chunk.rank, intersect(k, chunk.global));
      }
      return;
    }
    for (Span block = round_out({k.begin, k.begin + 1}); block.begin < k.end;
         block = round_out({block.end, block.end + 1})) {
      const int number = number_of(reader, home_of_block(reader, block));
      for (const Chunk& chunk : kv_layout_.overlapping(block)) {
        emit(number, chunk.rank, intersect(intersect(block, k), chunk.global));
      }
      if (block.end >= kv_layout_.seq()) break;
    }
  }

  void collect_receives() {
    const std::span<const RowRun> q_runs = q_layout_.runs(rank_);
    for (std::size_t list = 0; list < lists_; ++list) {
      if (!mask_.batch_offsets.empty()) {
        mine_.batch_offsets.push_back(static_cast<std::int64_t>(mine_.slices.size()));
      }
      for (const Slice& slice : mask_.view().of_batch(static_cast<std::int64_t>(list))) {
        for (const RowRun& run : overlapping(q_runs, slice.q)) {
          const Slice part = clip(slice, run.global, slice.k);
          if (part.k.empty() || part.q.empty()) continue;
          mine_.slices.push_back(part);
          for_each_part(rank_, round_out(part.k), [&](int number, int /*owner*/, Span rows) {
            if (number == 0) return;
            SpansOfLists& needs = needs_[number];
            needs.resize(lists_);
            needs[list].push_back(rows);
          });
        }
      }
    }
    if (!mask_.batch_offsets.empty()) {
      mine_.batch_offsets.push_back(static_cast<std::int64_t>(mine_.slices.size()));
    }
  }

  void collect_sends() {
    for (std::size_t list = 0; list < lists_; ++list) {
      for (const Slice& slice : mask_.view().of_batch(static_cast<std::int64_t>(list))) {
        for (const RowRun& run : overlapping(kv_layout_.runs(rank_), round_out(slice.k))) {
          offer(list, slice, run.global);
        }
      }
    }
  }

  // What readers of `slice` need of this rank's rows `held`.
  void offer(std::size_t list, const Slice& slice, Span held) {
    const Slice near = clip(slice, slice.q, round_out(held));
    if (near.k.empty()) return;
    for (const Chunk& chunk : q_layout_.overlapping(near.q)) {
      const Slice part = clip(near, chunk.global, near.k);
      if (part.k.empty() || part.q.empty()) continue;
      for_each_part(chunk.rank, round_out(part.k), [&](int number, int owner, Span rows) {
        if (number == 0 || owner != rank_) return;
        const Span own = intersect(rows, held);
        if (own.empty()) return;
        SpansOfLists& offers = offers_[{number, chunk.rank}];
        offers.resize(lists_);
        offers[list].push_back(own);
      });
    }
  }

  void add_local_stage() {
    Stage& stage = stages_[0];
    stage.buffer_rows = kv_layout_.rows(rank_);
    stage.runs.emplace_back();
    for (const RowRun& run : kv_layout_.runs(rank_)) {
      if (rules_.block_rows == 0) {
        stage.runs.back().push_back(run);
      } else {
        add_whole_blocks(run, stage.runs.back());
      }
    }
  }

  void add_whole_blocks(const RowRun& run, std::vector<RowRun>& runs) const {
    // A block may be whole on this rank and yet lie in two runs only if they touch, which layouts
    // rule out.
    const std::int64_t block = rules_.block_rows;
    const std::int64_t begin = (run.global.begin + block - 1) / block * block;
    const std::int64_t end =
        run.global.end == kv_layout_.seq() ? run.global.end : run.global.end / block * block;
    if (begin < end) runs.push_back({run.begin + (begin - run.global.begin), {begin, end}});
  }

  std::int64_t batch_of(std::size_t list) const {
    return mask_.batch_offsets.empty() ? Piece::kEveryBatch : static_cast<std::int64_t>(list);
  }

  // Lays the buffer out in global order, so that slices over neighbours' rows stay one.
  void add_receives(Stage& stage, SpansOfLists& needs) {
    std::map<int, Transfer> transfers;
    stage.runs.resize(lists_);
    for (std::size_t list = 0; list < lists_; ++list) {
      unite(needs[list]);
      std::int64_t next = 0;
      for (const Span span : needs[list]) {
        stage.runs[list].push_back({next, span});
        for (const Chunk& chunk : kv_layout_.overlapping(span)) {
          const Span rows = intersect(span, chunk.global);
          const std::int64_t local = chunk.local_begin + (rows.begin - chunk.global.begin);
          Transfer& transfer = transfers[chunk.rank];
          transfer.peer = chunk.rank;
          transfer.pieces.push_back(
              {batch_of(list), {local, local + rows.size()}, next + (rows.begin - span.begin)});
        }
        next += span.size();
      }
      stage.buffer_rows = std::max(stage.buffer_rows, next);
    }
    for (auto& [peer, transfer] : transfers) stage.receives.push_back(std::move(transfer));
  }

  void add_sends(const OfferKey& key, SpansOfLists& offers) {
    Stage& stage = stages_[key.number];
    if (stage.runs.empty()) stage.runs.resize(lists_);
    Transfer transfer{key.peer, {}};
    for (std::size_t list = 0; list < lists_; ++list) {
      unite(offers[list]);
      for (const Span span : offers[list]) {
        const std::int64_t local = kv_layout_.local_row(span.begin);
        transfer.pieces.push_back({batch_of(list), {local, local + span.size()}, 0});
      }
    }
    stage.sends.push_back(std::move(transfer));
  }

  const SequenceLayout& q_layout_;
  const SequenceLayout& kv_layout_;
  const MaskSlices& mask_;
  int rank_;
  StageRules rules_;
  std::size_t lists_;                  // of slices: one for every batch row, or one for all
  std::vector<int> number_;            // stage of each distance
  MaskSlices mine_;                    // the mask over this rank's query rows, in global positions
  std::map<int, SpansOfLists> needs_;  // by stage number
  std::map<OfferKey, SpansOfLists> offers_;  // by stage number and peer
  std::map<int, Stage> stages_;
};

}  // namespace

MaskSlices localize(const MaskSlices& mask, std::span<const RowRun> q_runs,
                    std::span<const std::vector<RowRun>> k_runs) {
  MaskSlices local;
  const bool by_batch = !mask.batch_offsets.empty();
  const std::size_t lists = by_batch ? mask.batch_offsets.size() - 1 : 1;
  for (std::size_t list = 0; list < lists; ++list) {
    if (by_batch) local.batch_offsets.push_back(static_cast<std::int64_t>(local.slices.size()));
    const std::span<const RowRun> keys = k_runs[k_runs.size() == 1 ? 0 : list];
    for (const Slice& slice : mask.view().of_batch(static_cast<std::int64_t>(list))) {
      for (const RowRun& q : overlapping(q_runs, slice.q)) {
        for (const RowRun& k : overlapping(keys, slice.k)) {
          const Slice part = clip(slice, q.global, k.global);
          if (part.q.empty() || part.k.empty()) continue;
          const std::int64_t q_shift = q.global.begin - q.begin;
          const std::int64_t k_shift = k.global.begin - k.begin;
          local.slices.push_back({{part.q.begin - q_shift, part.q.end - q_shift},
                                  {part.k.begin - k_shift, part.k.end - k_shift},
                                  part.band.shifted(q_shift, k_shift)});
        }
      }
    }
  }
  if (by_batch) local.batch_offsets.push_back(static_cast<std::int64_t>(local.slices.size()));
  return local;
}

std::vector<Stage> build_stages(const SequenceLayout& q_layout, const SequenceLayout& kv_layout,
                                const MaskSlices& mask, int rank, const StageRules& rules) {
  return StageBuilder(q_layout, kv_layout, mask, rank, rules).build();
}

}  // namespace annulus
