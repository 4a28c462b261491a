#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/cpu/scratch.hpp"

namespace annulus::kernels {

/// The order in which chunks of keys add to the dQ of each tile of queries: that of the chunks,
/// whichever thread has them, so that the sums have the same bits for any number of threads.
class AccumulationOrder {
 public:
  /// `rows` holds all queries of one (batch, KV head); a tile has `tile_rows` of them.
  AccumulationOrder(std::span<const Slice> slices, const RowBlock& rows, std::int64_t chunk_keys,
                    std::int64_t tile_rows);

  std::int64_t tiles() const { return tiles_; }
  /// Whether a chunk has anything to add to a tile.
  bool meets(std::int64_t chunk, std::int64_t tile) const { return turn(chunk, tile) >= 0; }
  /// Returns once all earlier chunks have added to the tile.
  void wait(std::int64_t chunk, std::int64_t tile) const;
  void pass(std::int64_t tile);

 private:
  std::int32_t& turn(std::int64_t chunk, std::int64_t tile) {
    return turns_[static_cast<std::size_t>(chunk * tiles_ + tile)];
  }
  std::int32_t turn(std::int64_t chunk, std::int64_t tile) const {
    return turns_[static_cast<std::size_t>(chunk * tiles_ + tile)];
  }

  std::int64_t tiles_ = 0;
  std::vector<std::int32_t> turns_;  // [chunks, tiles]; −1: nothing to add
  std::vector<std::atomic<std::int32_t>> next_;
};

/// Keys of one task: their K, V, dK and dV stay in L2 while the queries stream by.
std::int64_t backward_chunk_keys(const AttentionProblem& problem);

/// Queries of a tile on this processor's target.
std::int64_t backward_tile_rows(const AttentionProblem& problem);

std::int64_t backward_scratch(const AttentionProblem& problem);

/// Gradients through one chunk of keys: `rows.keys` is chunk `chunk`, `rows.queries` all queries.
/// @pre every earlier chunk of the same rows was started; scratch has room for backward_scratch().
void backward_keys(const BackwardCall& call, const RowBlock& rows, std::int64_t chunk,
                   AccumulationOrder& order, Scratch& scratch);

}  // namespace annulus::kernels
