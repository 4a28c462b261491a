#include "sharding/own_rows.hpp"

#include <algorithm>
#include <utility>

#include "sharding/waiting_kernel.hpp"

namespace annulus {
namespace {

ConstTensorView contiguous(const ConstTensorView& view) {
  return {nullptr, view.dtype, view.shape, view.device};
}

// A rank's rows as its messages have them: all, where runs end as messages do.
std::vector<Span> messages(const SequenceLayout& layout, int rank, std::int64_t row_bytes) {
  constexpr std::int64_t kAlignment = 256;
  if (row_bytes % kAlignment == 0) return {{0, layout.rows(rank)}};
  std::vector<Span> rows;
  for (const RowRun& run : layout.runs(rank)) rows.push_back(run.rows());
  return rows;
}

// Calls visit(rank, rows of a batch row, whether others of that rank came before).
template <typename Visit>
void for_each_run(const TensorView& rows, std::span<const RankRun> runs, Visit visit) {
  std::vector<int> before;
  for (std::int64_t b = 0; b < rows.shape[0]; ++b) {
    for (const auto& [rank, run] : runs) {
      const bool again = std::find(before.begin(), before.end(), rank) != before.end();
      if (!again) before.push_back(rank);
      visit(rank, rows.slice(0, {b, b + 1}).slice(1, run.rows()), again);
    }
  }
}

std::int64_t bytes_of(const ConstTensorView& view) {
  return view.shape.elements() * size_bytes(view.dtype);
}

}  // namespace

bool OwnRows::apply(const Communicator& heads, const AttentionPlan& plan,
                    const AttentionProblem& local, const ExecuteOptions& options) {
  AttentionProblem problem = local;  // the same on all ranks, but for rows
  problem.q = contiguous(problem.q);
  problem.k = contiguous(problem.k);
  problem.v = contiguous(problem.v);
  return plan.groups() == 1 && heads.carrier() == Communicator::Carrier::copy_engine &&
         static_cast<std::size_t>(heads.size()) <= kernels::cuda::kMaxSegments &&
         may_compute_segments(plan, problem, options);
}

OwnRows::OwnRows(const AttentionPlan& plan)
    : plan_(plan),
      self_(plan.rank()),
      q_heads_(plan.q_heads_of(self_)),
      kv_heads_(plan.kv_heads_of(self_)) {
  for (const SequenceLayout::Chunk& chunk : plan.request().q_layout.chunks()) {
    if (chunk.rank == self_) continue;
    others_.push_back({chunk.rank, {other_rows_, chunk.global}});
    other_runs_.push_back(others_.back().run);
    other_rows_ += chunk.global.size();
  }
  for (const SequenceLayout::Chunk& chunk : plan.request().kv_layout.chunks()) {
    const RowRun run{chunk.global.begin, chunk.global};
    all_keys_.push_back(run);
    if (chunk.rank == self_) continue;
    other_keys_.push_back(run);
    keys_of_others_.push_back({chunk.rank, run});
  }
}

void OwnRows::place_own_keys(const ConstTensorView& own, const TensorView& all,
                             Stream stream) const {
  for (const RowRun& run : plan_.request().kv_layout.runs(self_)) {
    copy(own.slice(1, run.rows()).slice(2, kv_heads_), all.slice(1, run.global), stream);
  }
}

Span OwnRows::kv_heads_for(Span q_heads) const {
  if (q_heads.empty()) return {kv_heads_.begin, kv_heads_.begin};
  const std::int64_t offset = plan_.request().q_head_offset;
  return {(q_heads.begin + offset) / plan_.group_size(),
          (q_heads.end - 1 + offset) / plan_.group_size() + 1};
}

HeadGroups OwnRows::groups_of(Span q_heads, Span kv_heads) const {
  return {plan_.group_size(),
          q_heads.begin + plan_.request().q_head_offset - kv_heads.begin * plan_.group_size()};
}

void OwnRows::send_heads(const SequenceLayout& layout, const ConstTensorView& local, int peer,
                         Span heads, std::vector<Send>& sends) const {
  const ConstTensorView view = local.slice(2, heads);
  const std::int64_t element = size_bytes(view.dtype);
  const std::int64_t row_bytes = heads.size() * view.shape[3] * element;
  for (std::int64_t b = 0; b < view.shape[0]; ++b) {
    for (const Span rows : messages(layout, self_, row_bytes)) {
      const std::int64_t offset = b * view.strides[0] + rows.begin * view.strides[1];
      sends.push_back({.peer = peer,
                       .data = static_cast<const std::byte*>(view.data) + offset * element,
                       .bytes = rows.size() * row_bytes,
                       .rows = std::max<std::int64_t>(rows.size(), 1),
                       .pitch = view.strides[1] * element});
    }
  }
}

void OwnRows::send_runs(const TensorView& rows, std::span<const RankRun> runs,
                        std::vector<Send>& sends) {
  for_each_run(rows, runs, [&](int rank, const TensorView& part, bool again) {
    sends.push_back({rank, part.data, bytes_of(part), again});
  });
}

void OwnRows::receive_runs(const TensorView& rows, std::span<const RankRun> runs,
                           std::vector<Receive>& receives) {
  for_each_run(rows, runs, [&](int rank, const TensorView& part, bool again) {
    receives.push_back({rank, part.data, bytes_of(part), again});
  });
}

std::vector<RankRun> runs_with(int peer, const SequenceLayout& layout, int rank) {
  std::vector<RankRun> runs;
  for (const RowRun& run : layout.runs(rank)) runs.push_back({peer, run});
  return runs;
}

bool lies_well(const ConstTensorView& view) {
  const bool heads_follow = view.shape[2] == 1 || view.strides[2] == view.shape[3];
  return view.strides[3] == 1 && heads_follow && view.strides[0] % 8 == 0 &&
         view.strides[1] % 8 == 0 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
}

ConstTensorView lying_well(const ConstTensorView& view, Stream stream,
                           std::vector<DeviceTensor>& moved) {
  if (lies_well(view)) return view;
  moved.emplace_back(view.dtype, view.shape, stream);
  copy(view, moved.back().view, stream);
  return moved.back().view;
}

}  // namespace annulus
