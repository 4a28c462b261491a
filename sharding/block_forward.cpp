#include "sharding/block_forward.hpp"

#include <algorithm>
#include <map>

#include "sharding/block_tree.hpp"

namespace annulus {
namespace {

AttentionState rows_of_state(const AttentionState& state, Span rows) {
  return {state.accumulator.slice(1, rows), state.row_max.slice(2, rows),
          state.row_sum.slice(2, rows)};
}

AttentionState batch_of_state(const AttentionState& state, Span batch) {
  return {state.accumulator.slice(0, batch), state.row_max.slice(0, batch),
          state.row_sum.slice(0, batch)};
}

void copy_state(const AttentionState& from, const AttentionState& to, Stream stream) {
  copy(from.accumulator, to.accumulator, stream);
  copy(from.row_max, to.row_max, stream);
  copy(from.row_sum, to.row_sum, stream);
}

// The problem of some of its query rows, without keys; sinks are folded in once, at the end.
ForwardCall call_of_rows(const ForwardCall& local, Span rows) {
  ForwardCall call;
  call.problem = local.problem;
  call.problem.q = local.problem.q.slice(1, rows);
  call.problem.sinks = {};
  call.row_invariant = true;
  if (local.problem.bias) call.problem.bias = local.problem.bias.slice(2, rows);
  if (local.problem.dense_mask) call.problem.dense_mask = local.problem.dense_mask.slice(2, rows);
  call.stream = local.stream;
  return call;
}

// A partial result of the rows [rows).
struct Partial {
  OwnedState state;  // room for all rows
  Span rows;
};

// Slices in layers that each meet a query row at most once, in the order of their keys: how a
// kernel joins the keys of a row then does not depend on which rows share its tile.
std::vector<MaskSlices> layers_of(const MaskSlices& slices) {
  std::vector<MaskSlices> layers;
  const std::size_t lists = slices.batch_offsets.empty() ? 1 : slices.batch_offsets.size() - 1;
  std::vector<std::vector<std::vector<Slice>>> of_list(lists);
  for (std::size_t list = 0; list < lists; ++list) {
    const auto given = slices.view().of_batch(static_cast<std::int64_t>(list));
    std::vector<Slice> ordered(given.begin(), given.end());
    std::stable_sort(ordered.begin(), ordered.end(),
                     [](const Slice& a, const Slice& b) { return a.k.begin < b.k.begin; });
    std::vector<std::vector<Slice>>& own = of_list[list];
    for (const Slice& slice : ordered) {
      // After the last layer that shares a row with it, so that a row meets its keys in order.
      std::size_t layer = own.size();
      while (layer > 0 &&
             std::none_of(own[layer - 1].begin(), own[layer - 1].end(), [&](const Slice& other) {
               return !intersect(other.q, slice.q).empty();
             })) {
        --layer;
      }
      if (layer == own.size()) own.emplace_back();
      own[layer].push_back(slice);
    }
  }
  std::size_t count = 0;
  for (const auto& own : of_list) count = std::max(count, own.size());
  for (std::size_t layer = 0; layer < count; ++layer) {
    MaskSlices& joined = layers.emplace_back();
    for (const auto& own : of_list) {
      if (!slices.batch_offsets.empty()) {
        joined.batch_offsets.push_back(static_cast<std::int64_t>(joined.slices.size()));
      }
      if (layer < own.size()) {
        joined.slices.insert(joined.slices.end(), own[layer].begin(), own[layer].end());
      }
    }
    if (!slices.batch_offsets.empty()) {
      joined.batch_offsets.push_back(static_cast<std::int64_t>(joined.slices.size()));
    }
  }
  return layers;
}

// The blocks that come to each list of batch rows, by the first of them.
std::map<std::int64_t, std::vector<BlockNode>> blocks_of(const AttentionPlan& plan) {
  const PlanRequest& request = plan.request();
  std::map<std::int64_t, std::vector<BlockNode>> blocks;
  for (const Stage& stage : plan.stages()) {
    for (const StagePart& part :
         parts_of(stage, request.batch, Granularity::block, request.block_rows)) {
      blocks[part.batch.begin].push_back({0, part.column_begin / request.block_rows});
    }
  }
  return blocks;
}

class BlockForwardPass final : public ForwardPass {
 public:
  BlockForwardPass(const ForwardCall& local, const AttentionPlan& plan,
                   const ExecuteOptions& options)
      : local_(local),
        block_rows_(plan.request().block_rows),
        q_positions_(positions_of(plan.q_layout().runs(plan.group()))),
        options_(options),
        idle_(local.problem.q.shape.elements() == 0) {
    for (auto& [batch_begin, list] : blocks_of(plan))
      trees_.emplace(batch_begin, BlockTree<Partial>(list));
  }

  void add(const StagePart& part, const ConstTensorView& k, const ConstTensorView& v,
           bool /*last*/) override {
    if (idle_) return;
    const ScopedTimer timer(compute_seconds(options_));
    trees_.at(part.batch.begin)
        .add(block_of(part), compute(part, k, v), [this](Partial& left, Partial right) {
          merge_rows(left, right);
          spare_.push_back(std::move(right));
        });
  }

  void finish() override {
    if (idle_) return;
    const ScopedTimer timer(compute_seconds(options_));
    if (const Partial* root = whole_root()) {
      return annulus::finish(root->state.views, local_.o, local_.log_sum_exp, local_.stream);
    }
    OwnedState all(local_.problem, local_.stream);
    start_rows(local_, all.views, options_);
    for (const auto& [batch_begin, tree] : trees_) {
      const Partial& root = *tree.root();
      const std::int64_t batch = root.state.views.accumulator.shape[0];
      const AttentionState into =
          rows_of_state(batch_of_state(all.views, {batch_begin, batch_begin + batch}), root.rows);
      merge(rows_of_state(root.state.views, root.rows), into, local_.stream);
    }
    annulus::finish(all.views, local_.o, local_.log_sum_exp, local_.stream);
    buffer_bytes_ += all.memory.bytes();
  }

  std::int64_t buffer_bytes() const override { return buffer_bytes_; }

 private:
  BlockNode block_of(const StagePart& part) const { return {0, part.column_begin / block_rows_}; }

  // The root of the only tree where it has every row and there is nothing to fold in: to merge it
  // into an empty state would change no bit.
  const Partial* whole_root() const {
    if (local_.problem.sinks || trees_.size() != 1) return nullptr;
    const Partial& root = *trees_.begin()->second.root();
    const bool whole = root.rows == Span{0, local_.problem.seq_q()} &&
                       root.state.views.accumulator.shape[0] == local_.problem.batch();
    return whole ? &root : nullptr;
  }

  // The rows that the block's slices touch, from nothing.
  Partial compute(const StagePart& part, const ConstTensorView& k, const ConstTensorView& v) {
    const Span rows = query_rows(part);
    StagePart moved = part;
    for (Slice& slice : moved.slices.slices) {
      slice.q = {slice.q.begin - rows.begin, slice.q.end - rows.begin};
      slice.band = slice.band.shifted(rows.begin, 0);
    }
    Partial partial = take_spare(part.batch);
    partial.rows = rows;
    const std::vector<PositionRun> positions = positions_within(q_positions_, rows);
    ForwardCall call = call_of_rows(local_, rows);
    call.problem = problem_of_part(call.problem, moved, k, v, positions);
    call.state = rows_of_state(partial.state.views, rows);
    for (const MaskSlices& layer : layers_of(moved.slices)) {
      call.problem.mask = layer.view();
      attention_forward(call, options_.backend);
      call.start = ForwardCall::Start::resume;
    }
    return partial;
  }

  Partial take_spare(Span batch) {
    const auto fits = [&](const Partial& partial) {
      return partial.state.views.accumulator.shape[0] == batch.size();
    };
    const auto found = std::find_if(spare_.begin(), spare_.end(), fits);
    if (found != spare_.end()) {
      Partial partial = std::move(*found);
      spare_.erase(found);
      return partial;
    }
    AttentionProblem problem = local_.problem;
    problem.q = problem.q.slice(0, batch);
    Partial partial{OwnedState(problem, local_.stream), {}};
    buffer_bytes_ += partial.state.memory.bytes();
    return partial;
  }

  // left ← left ⊕ right over the rows of either.
  void merge_rows(Partial& left, const Partial& right) {
    const Span both = intersect(left.rows, right.rows);
    if (!both.empty()) {
      merge(rows_of_state(right.state.views, both), rows_of_state(left.state.views, both),
            local_.stream);
    }
    const Span hull{std::min(left.rows.begin, right.rows.begin),
                    std::max(left.rows.end, right.rows.end)};
    for (const Span missing : {Span{hull.begin, left.rows.begin}, Span{left.rows.end, hull.end}}) {
      if (missing.empty()) continue;
      const Span held = intersect(missing, right.rows);
      if (held != missing) clear(left, missing);
      if (held.empty()) continue;
      copy_state(rows_of_state(right.state.views, held), rows_of_state(left.state.views, held),
                 local_.stream);
    }
    left.rows = hull;
  }

  void clear(const Partial& partial, Span rows) {
    ForwardCall call = call_of_rows(local_, rows);
    const std::int64_t batch = partial.state.views.accumulator.shape[0];
    call.problem.q = call.problem.q.slice(0, {0, batch});
    start_rows(call, rows_of_state(partial.state.views, rows), options_);
  }

  const ForwardCall& local_;
  std::int64_t block_rows_;
  std::vector<PositionRun> q_positions_;
  const ExecuteOptions& options_;
  bool idle_;
  std::map<std::int64_t, BlockTree<Partial>> trees_;  // by first batch row
  std::vector<Partial> spare_;
  std::int64_t buffer_bytes_ = 0;
};

}  // namespace

std::unique_ptr<ForwardPass> make_block_forward_pass(const ForwardCall& local,
                                                     const AttentionPlan& plan,
                                                     const ExecuteOptions& options) {
  return std::make_unique<BlockForwardPass>(local, plan, options);
}

std::int64_t block_state_rows(const AttentionPlan& plan) {
  struct Held {
    Span rows;
    std::int64_t batch = 0;
  };
  const PlanRequest& request = plan.request();
  const std::int64_t seq_q = plan.q_layout().rows(plan.group());
  std::map<std::int64_t, BlockTree<Held>> trees;
  for (auto& [batch_begin, list] : blocks_of(plan)) trees.emplace(batch_begin, list);
  std::vector<Held> spare;
  std::int64_t batch_rows = 0;
  const auto merge = [&spare](Held& left, const Held& right) {
    left.rows = {std::min(left.rows.begin, right.rows.begin),
                 std::max(left.rows.end, right.rows.end)};
    spare.push_back(right);
  };
  for (const Stage& stage : plan.stages()) {
    for (const StagePart& part :
         parts_of(stage, request.batch, Granularity::block, request.block_rows)) {
      const auto fits = [&](const Held& held) { return held.batch == part.batch.size(); };
      const auto found = std::find_if(spare.begin(), spare.end(), fits);
      if (found == spare.end()) {
        batch_rows += part.batch.size();
      } else {
        spare.erase(found);
      }
      trees.at(part.batch.begin)
          .add({0, part.column_begin / request.block_rows}, {query_rows(part), part.batch.size()},
               merge);
    }
  }
  const bool whole = trees.size() == 1 && trees.begin()->second.root()->batch == request.batch &&
                     trees.begin()->second.root()->rows == Span{0, seq_q};
  return (batch_rows + (whole ? 0 : request.batch)) * seq_q;
}

std::int64_t reproducible_block_rows(std::int64_t seq_kv) {
  // Each block costs a pass over the rows' state, as much as some 50 keys: 2% for 4,096 rows, which
  // stay a small part of a long sequence. A short one has two or three blocks.
  std::int64_t rows = 128;
  while (rows < 4096 && rows * 2 < seq_kv) rows *= 2;
  return rows;
}

std::int64_t reproducible_query_rows(std::int64_t seq_q) {
  // Each block costs a packing of the keys that it sees; a rank has whole blocks, so that there are
  // some for each of eight ranks.
  std::int64_t rows = 16;
  while (rows < 1024 && rows * 16 < seq_q) rows *= 2;
  return rows;
}

}  // namespace annulus
