#include "sharding/block_tree.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

namespace annulus {
namespace {

// How partials were joined, in words.
std::string joined(const std::vector<BlockNode>& nodes, const std::vector<std::size_t>& order,
                   const std::vector<std::string>& partials) {
  BlockTree<std::string> tree(nodes);
  for (const std::size_t i : order) {
    tree.add(nodes[i], partials[i],
             [](std::string& left, std::string right) { left = "(" + left + "+" + right + ")"; });
  }
  return tree.root().value_or("nothing");
}

TEST(BlockTree, JoinsInOneOrderHoweverBlocksArriveAndAreSpread) {
  const std::uint64_t seed = std::random_device{}();
  std::mt19937_64 random(seed);
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  for (int run = 0; run < 200; ++run) {
    const auto count = static_cast<std::int64_t>(1 + random() % 23);
    const auto ranks = static_cast<int>(1 + random() % 5);
    std::vector<int> rank_of;
    for (std::int64_t b = 0; b < count; ++b) rank_of.push_back(static_cast<int>(random() % ranks));
    const auto spread = [&](int parts) {
      std::vector<BlockNode> nodes;
      std::vector<std::string> partials;
      for (int rank = 0; rank < parts; ++rank) {
        std::vector<Span> held;
        for (std::int64_t b = 0; b < count; ++b) {
          if (parts == 1 || rank_of[static_cast<std::size_t>(b)] == rank)
            held.push_back({b, b + 1});
        }
        for (const BlockNode& node : nodes_of(held, count)) {
          std::vector<BlockNode> leaves;
          std::vector<std::string> names;
          std::vector<std::size_t> order;
          for (std::int64_t b = node.blocks().begin; b < std::min(node.blocks().end, count); ++b) {
            order.push_back(leaves.size());
            leaves.push_back({0, b});
            names.push_back(std::to_string(b));
          }
          std::shuffle(order.begin(), order.end(), random);
          nodes.push_back(node);
          partials.push_back(joined(leaves, order, names));
        }
      }
      std::vector<std::size_t> order(nodes.size());
      for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), random);
      return joined(nodes, order, partials);
    };
    EXPECT_EQ(spread(ranks), spread(1));
  }
}

TEST(BlockTree, NodesAreTheFewestThatHoldTheBlocks) {
  const std::vector<Span> held{{0, 4}, {6, 7}, {8, 11}};
  const std::vector<BlockNode> expected{{2, 0}, {0, 6}, {3, 1}};
  EXPECT_EQ(nodes_of(held, 11), expected);
  EXPECT_TRUE(nodes_of({}, 5).empty());
}

}  // namespace
}  // namespace annulus
