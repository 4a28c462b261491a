#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"
#include "sharding/attention_plan.hpp"

namespace annulus {

/// Keys whose gradients go up the tree together: the rows [rows) cut at every block of the grid of
/// keys, and within a block every so many rows. Global positions.
std::vector<Span> gradient_cells(Span rows, std::int64_t block_rows);
/// Most rows of a cell.
std::int64_t gradient_cell_rows(std::int64_t block_rows);

/// Buffers of one size that are used again; `dry`: only counted.
class PartialPool {
 public:
  PartialPool(Device device, std::int64_t bytes, bool dry, Stream stream)
      : device_(device), bytes_(bytes), dry_(dry), stream_(stream) {}

  Buffer take();
  void give(Buffer buffer) { spare_.push_back(std::move(buffer)); }
  std::int64_t held_bytes() const { return held_ * bytes_; }

 private:
  Device device_;
  std::int64_t bytes_;
  bool dry_;
  Stream stream_;
  std::int64_t held_ = 0;
  std::vector<Buffer> spare_;
};

/// into[kv head] += from[query head] for each query head in turn, [batch, rows, heads, dim].
void add_query_heads(const ConstTensorView& from, const TensorView& into, const HeadGroups& groups,
                     Stream stream);

enum class KvSide : std::uint8_t { key, value };

/// Sums the gradients of a rank's own keys and values over the grid of query blocks, in its binary
/// tree, whichever ranks computed which nodes and in whatever order those arrive. Each query head
/// has a sum of its own; those of a KV head are added one after the other at the end.
class GradientTree {
 public:
  struct Own {
    TensorView grad_k;  // f32 [batch, own rows, kv_heads or q_heads, head_dim]; added to
    TensorView grad_v;
    std::int64_t q_heads = 0;  // of the partials
    HeadGroups groups;
  };

  /// `dry`: only counts memory; the views of `own` may be null.
  GradientTree(const AttentionPlan& plan, const Own& own, Stream stream, bool dry = false);

  /// What `group` computed for its node number `node`: `part` is [1, rows, q_heads, dim] for the
  /// own rows [rows) of batch row `batch`, or absent where no query of the node sees them.
  void add(int group, std::size_t node, std::int64_t batch, Span rows, KvSide side,
           const ConstTensorView& part);
  std::int64_t buffer_bytes() const;

 private:
  // A partial in memory of its own or of someone else's; absent: zeros.
  struct Partial {
    Buffer memory;
    ConstTensorView view;
    bool own = false;
  };
  using CellKey = std::tuple<KvSide, std::int64_t, std::int64_t>;  // batch row, first own row
  struct Cell {
    std::vector<BlockNode> expected;
    std::optional<BlockTree<Partial>> tree;
  };

  template <typename Visit>
  void for_each_cell(Span rows, Visit visit) const;
  void expect(int group, std::int64_t batch, Span rows);
  const std::vector<BlockNode>& nodes(int group);
  TensorView view_of(const Buffer& memory, KvSide side, std::int64_t rows) const;
  void keep(KvSide side, Partial& partial);
  void merge(KvSide side, Partial& left, Partial right);
  void add_root(const CellKey& key, Partial root);
  PartialPool& pool(KvSide side) { return pools_[static_cast<std::size_t>(side)]; }

  const AttentionPlan& plan_;
  Own own_;
  Stream stream_;
  bool dry_;
  std::map<int, std::vector<BlockNode>> nodes_;  // by group
  std::map<CellKey, Cell> cells_;
  std::array<PartialPool, 2> pools_;
};

}  // namespace annulus
