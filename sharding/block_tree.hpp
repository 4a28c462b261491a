#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kernels/types.hpp"

namespace annulus {

/// A node of the binary tree over the blocks of a grid: blocks [index·2^level, (index +
/// 1)·2^level).
struct BlockNode {
  int level = 0;
  std::int64_t index = 0;

  Span blocks() const { return {index << level, (index + 1) << level}; }
  BlockNode parent() const { return {level + 1, index / 2}; }
  BlockNode sibling() const { return {level, index ^ 1}; }
  auto operator<=>(const BlockNode&) const = default;
};

/// The fewest nodes that together are the blocks `held` of [0, count), in order. `held` is sorted.
std::vector<BlockNode> nodes_of(std::span<const Span> held, std::int64_t count);

/// Partial results on their way up the tree. Blocks that nothing was computed for are not there: to
/// merge an empty partial would change no bit.
template <typename Partial>
class BlockTree {
 public:
  /// left ← left ⊕ right; what is left of `right` is the callee's.
  using Merge = std::function<void(Partial& left, Partial right)>;
  /// Called for a partial that will stay for a while.
  using Keep = std::function<void(Partial&)>;

  /// `nodes` will arrive, each once, in any order; no two share a block.
  explicit BlockTree(std::vector<BlockNode> nodes) : nodes_(std::move(nodes)) {
    std::sort(nodes_.begin(), nodes_.end(), [](const BlockNode& a, const BlockNode& b) {
      return a.blocks().begin < b.blocks().begin;
    });
  }

  void add(BlockNode at, Partial partial, const Merge& merge, const Keep& keep = nullptr) {
    while (covers_less_than_all(at)) {
      if (holds_any(at.sibling())) {
        const auto other = waiting_.find(at.sibling());
        if (other == waiting_.end()) {
          if (keep) keep(partial);
          waiting_.emplace(at, std::move(partial));
          return;
        }
        Partial both = std::move(other->second);
        waiting_.erase(other);
        if (at.index % 2 == 0) std::swap(both, partial);
        merge(both, std::move(partial));
        partial = std::move(both);
      }
      at = at.parent();
    }
    if (keep) keep(partial);
    root_ = std::move(partial);
  }

  std::optional<Partial>& root() { return root_; }
  const std::optional<Partial>& root() const { return root_; }

 private:
  bool holds_any(BlockNode node) const {
    const Span blocks = node.blocks();
    const auto first = std::partition_point(
        nodes_.begin(), nodes_.end(),
        [&](const BlockNode& other) { return other.blocks().end <= blocks.begin; });
    return first != nodes_.end() && first->blocks().begin < blocks.end;
  }
  bool covers_less_than_all(BlockNode node) const {
    return node.blocks().begin > nodes_.front().blocks().begin ||
           node.blocks().end < nodes_.back().blocks().end;
  }

  std::vector<BlockNode> nodes_;  // in the order of their blocks
  std::map<BlockNode, Partial> waiting_;
  std::optional<Partial> root_;
};

}  // namespace annulus
