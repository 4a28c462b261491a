#include "sharding/block_tree.hpp"

namespace annulus {
namespace {

std::int64_t held_within(std::span<const Span> held, Span blocks) {
  std::int64_t count = 0;
  for (const Span span : held) count += std::max<std::int64_t>(intersect(span, blocks).size(), 0);
  return count;
}

void add_nodes(std::span<const Span> held, std::int64_t count, BlockNode node,
               std::vector<BlockNode>& nodes) {
  const Span blocks = intersect(node.blocks(), {0, count});
  const std::int64_t own = held_within(held, blocks);
  if (own == 0) return;
  if (own == blocks.size()) {
    nodes.push_back(node);
    return;
  }
  add_nodes(held, count, {node.level - 1, 2 * node.index}, nodes);
  add_nodes(held, count, {node.level - 1, 2 * node.index + 1}, nodes);
}

}  // namespace

std::vector<BlockNode> nodes_of(std::span<const Span> held, std::int64_t count) {
  BlockNode all;
  while (all.blocks().end < count) ++all.level;
  std::vector<BlockNode> nodes;
  add_nodes(held, count, all, nodes);
  return nodes;
}

}  // namespace annulus
