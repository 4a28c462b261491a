#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels/attention.hpp"

namespace annulus::kernels {

/// Keys of a tile: K and V of it stay in L2, the probabilities in L1.
inline constexpr std::int64_t kKeyTile = 128;

/// Most queries of a tile on any target.
inline constexpr std::int64_t kMaxLanes = 48;

/// The query heads served by one KV head: consecutive, and fewer at the edges of a rank's share.
Span heads_of_kv_head(const AttentionProblem& problem, std::int64_t kv_head);

/// What one task computes: some queries of all heads of a group against a range of keys.
struct RowBlock {
  std::int64_t batch = 0;
  std::int64_t kv_head = 0;
  Span q_heads;
  Span queries;
  Span keys;

  std::int64_t rows() const { return queries.size() * q_heads.size(); }
};

/// What a problem's mask keeps of a block.
std::vector<Slice> slices_of(const AttentionProblem& problem, const RowBlock& block);

/// Query and head of each lane of a tile. Rows run over the heads of a group first, so that a tile
/// spans few queries and a causal edge wastes little; lanes past the last row repeat it.
struct TileRows {
  std::int64_t first_row = 0;  // in the block
  std::int64_t count = 0;
  Span queries;
  std::array<std::int64_t, kMaxLanes> query{};
  std::array<std::int64_t, kMaxLanes> head{};
};

/// The tile of at most `most` rows from `first_row` on.
TileRows rows_of_tile(const RowBlock& block, std::int64_t first_row, std::int64_t most);

/// Element offset of [b, s, h, 0] in a view [batch, seq, heads, dim].
inline std::int64_t row_offset(const ConstTensorView& view, std::int64_t b, std::int64_t s,
                               std::int64_t h) {
  return b * view.strides[0] + s * view.strides[1] + h * view.strides[2];
}

/// Element offset of [b, h, q] in a view [batch, heads, seq].
inline std::int64_t statistic_offset(const ConstTensorView& view, std::int64_t b, std::int64_t h,
                                     std::int64_t q) {
  return b * view.strides[0] + h * view.strides[1] + q * view.strides[2];
}

/// Element offset of [b, h, q, 0] in a view [batch|1, heads|1, seq_q, seq_kv].
inline std::int64_t pair_offset(const ConstTensorView& view, std::int64_t b, std::int64_t h,
                                std::int64_t q) {
  return (view.shape[0] == 1 ? 0 : b * view.strides[0]) +
         (view.shape[1] == 1 ? 0 : h * view.strides[1]) + q * view.strides[2];
}

}  // namespace annulus::kernels
