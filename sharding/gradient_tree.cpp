#include "sharding/gradient_tree.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include "sharding/stage_parts.hpp"

namespace annulus {
namespace {

// What two of them take, K and V of eight heads, stays in a cache of a few MB.
constexpr std::int64_t kCellRows = 512;
constexpr std::int64_t kFloatBytes = 4;

std::int64_t bytes_of_cell(const AttentionPlan& plan, const TensorView& gradient,
                           std::int64_t heads) {
  const std::int64_t rows = gradient_cell_rows(plan.request().block_rows);
  return rows * heads * gradient.shape[3] * kFloatBytes;
}

}  // namespace

std::int64_t gradient_cell_rows(std::int64_t block_rows) { return std::min(block_rows, kCellRows); }

std::vector<Span> gradient_cells(Span rows, std::int64_t block_rows) {
  std::vector<Span> cells;
  for (std::int64_t begin = rows.begin; begin < rows.end;) {
    const std::int64_t block = begin / block_rows * block_rows;
    const std::int64_t cell = block + (begin - block) / kCellRows * kCellRows;
    const std::int64_t end = std::min({cell + kCellRows, block + block_rows, rows.end});
    cells.push_back({begin, end});
    begin = end;
  }
  return cells;
}

Buffer PartialPool::take() {
  if (spare_.empty()) {
    ++held_;
    return dry_ ? Buffer() : Buffer(device_, bytes_, stream_);
  }
  Buffer buffer = std::move(spare_.back());
  spare_.pop_back();
  return buffer;
}

GradientTree::GradientTree(const AttentionPlan& plan, const Own& own, Stream stream, bool dry)
    : plan_(plan),
      own_(own),
      stream_(stream),
      dry_(dry),
      pools_{
          PartialPool(own.grad_k.device, bytes_of_cell(plan, own.grad_k, own.q_heads), dry, stream),
          PartialPool(own.grad_v.device, bytes_of_cell(plan, own.grad_v, own.q_heads), dry,
                      stream)} {
  const PlanRequest& request = plan_.request();
  for (const Stage& stage : plan_.stages()) {
    if (stage.number == 0) {
      for (const StagePart& part :
           parts_of(stage, request.batch, Granularity::block, request.block_rows)) {
        for (std::int64_t b = part.batch.begin; b < part.batch.end; ++b) {
          expect(plan_.group(), b, part.rows);
        }
      }
    }
    for (const Transfer& transfer : stage.sends) {
      for (const Piece& piece : transfer.pieces) {
        const bool every = piece.batch == Piece::kEveryBatch;
        const Span batch = every ? Span{0, request.batch} : Span{piece.batch, piece.batch + 1};
        for (std::int64_t b = batch.begin; b < batch.end; ++b) expect(transfer.peer, b, piece.rows);
      }
    }
  }
  for (auto& [key, cell] : cells_) cell.tree.emplace(std::move(cell.expected));
}

const std::vector<BlockNode>& GradientTree::nodes(int group) {
  const auto found = nodes_.find(group);
  return found != nodes_.end() ? found->second
                               : nodes_.emplace(group, plan_.gradient_nodes(group)).first->second;
}

// Calls visit(own rows) for each cell of consecutive own rows that also follow each other globally.
template <typename Visit>
void GradientTree::for_each_cell(Span rows, Visit visit) const {
  if (rows.empty()) return;
  const std::int64_t global = plan_.kv_layout().global_row(plan_.group(), rows.begin);
  for (const Span cell :
       gradient_cells({global, global + rows.size()}, plan_.request().block_rows)) {
    visit(Span{rows.begin + (cell.begin - global), rows.begin + (cell.end - global)});
  }
}

void GradientTree::expect(int group, std::int64_t batch, Span rows) {
  const std::vector<BlockNode>& theirs = nodes(group);
  for_each_cell(rows, [&](Span cell) {
    for (const KvSide side : {KvSide::key, KvSide::value}) {
      std::vector<BlockNode>& expected = cells_[{side, batch, cell.begin}].expected;
      expected.insert(expected.end(), theirs.begin(), theirs.end());
    }
  });
}

TensorView GradientTree::view_of(const Buffer& memory, KvSide side, std::int64_t rows) const {
  const TensorView& own = side == KvSide::key ? own_.grad_k : own_.grad_v;
  return {memory.data(), DType::f32, {1, rows, own_.q_heads, own.shape[3]}, own.device};
}

void GradientTree::keep(KvSide side, Partial& partial) {
  if (partial.own || partial.view.rank() == 0) return;
  partial.memory = pool(side).take();
  partial.own = true;
  const TensorView view = view_of(partial.memory, side, partial.view.shape[1]);
  if (!dry_) copy(partial.view, view, stream_);
  partial.view = view;
}

void GradientTree::merge(KvSide side, Partial& left, Partial right) {
  // A sum of two does not depend on which comes first.
  if (!left.own && (right.own || left.view.rank() == 0)) std::swap(left, right);
  if (right.view.rank() > 0) {
    keep(side, left);
    const TensorView into = view_of(left.memory, side, left.view.shape[1]);
    if (!dry_) accumulate(right.view, into, stream_);
  }
  if (right.own) pool(side).give(std::move(right.memory));
}

void GradientTree::add(int group, std::size_t node, std::int64_t batch, Span rows, KvSide side,
                       const ConstTensorView& part) {
  const BlockNode at = nodes(group)[node];
  for_each_cell(rows, [&](Span cell) {
    const CellKey key{side, batch, cell.begin};
    BlockTree<Partial>& tree = *cells_.at(key).tree;
    Partial partial;
    if (part.rank() > 0 && dry_) {
      partial.view = part;
      partial.view.shape[1] = cell.size();
    } else if (part.rank() > 0) {
      partial.view = part.slice(1, {cell.begin - rows.begin, cell.end - rows.begin});
    }
    tree.add(
        at, std::move(partial),
        [&](Partial& left, Partial right) { merge(side, left, std::move(right)); },
        [&](Partial& kept) { keep(side, kept); });
    if (tree.root()) add_root(key, std::move(*tree.root()));
  });
}

void GradientTree::add_root(const CellKey& key, Partial root) {
  const auto& [side, batch, row] = key;
  if (root.view.rank() > 0 && !dry_) {
    const TensorView& own = side == KvSide::key ? own_.grad_k : own_.grad_v;
    const TensorView into =
        own.slice(0, {batch, batch + 1}).slice(1, {row, row + root.view.shape[1]});
    add_query_heads(root.view, into, own_.groups, stream_);
  }
  if (root.own) pool(side).give(std::move(root.memory));
  cells_.erase(key);
}

std::int64_t GradientTree::buffer_bytes() const {
  return pools_[0].held_bytes() + pools_[1].held_bytes();
}

void add_query_heads(const ConstTensorView& from, const TensorView& into, const HeadGroups& groups,
                     Stream stream) {
  if (from.shape[2] == into.shape[2]) return accumulate(from, into, stream);
  const std::int64_t group =
      groups.group_size > 0 ? groups.group_size : from.shape[2] / into.shape[2];
  for (std::int64_t head = 0; head < from.shape[2]; ++head) {
    const std::int64_t kv = (head + groups.q_head_offset) / group;
    accumulate(from.slice(2, {head, head + 1}), into.slice(2, {kv, kv + 1}), stream);
  }
}

}  // namespace annulus
