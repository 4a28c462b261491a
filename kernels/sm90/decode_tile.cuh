#pragma once

#include "kernels/sm90/decode_work.cuh"
#include "kernels/sm90/forward_softmax.cuh"

/// Shape of the decode kernel's tile and its shared memory.
namespace annulus::kernels::sm90 {

inline constexpr int kWarpgroupRows = kTileRows;
inline constexpr int kWarpgroupThreads = 128;

/// Keys and values wait in rings of their own; together 192 KB, so that more than 64 KB are under
/// way at any time whatever the consumers do. A launch may use fewer of the stages.
template <typename Element_, int kHeadDim_, int kBlock_, int kStages_, int kConsumers_ = 1>
struct DecodeTile {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kHeadDim_;
  static constexpr int kBlock = kBlock_;  // keys at a time
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups, which take the blocks in turn
  static constexpr int kFewStages = (2 * kStages + 2) / 3 / kConsumers * kConsumers;
  static_assert(kStages % kConsumers == 0, "a stage is always the same warpgroup's");
  static constexpr int kThreads =
      kWarpgroupThreads * (1 + kConsumers);  // and a producing warpgroup
  using Layout = SwizzledTile<kHeadDim % 64 == 0 ? 128 : 64>;
  static constexpr int kBoxes = kHeadDim / Layout::kColumns;
  static constexpr int kBytes = kBlock * kHeadDim * 2;  // of a stage
};

template <typename Tile>
struct DecodeShared {
  using Element = typename Tile::Element;

  alignas(1024) Element q[kWarpgroupRows * Tile::kHeadDim];
  alignas(1024) Element k[Tile::kStages][Tile::kBlock * Tile::kHeadDim];
  alignas(1024) Element v[Tile::kStages][Tile::kBlock * Tile::kValueDim];
  RowStatistics statistics[Tile::kConsumers > 1 ? kWarpgroupThreads : 1];  // handed over
  WorkRun run;
  WorkSum warp_sums[Tile::kThreads / 32];
  std::uint64_t k_full[Tile::kStages], k_empty[Tile::kStages];
  std::uint64_t v_full[Tile::kStages], v_empty[Tile::kStages];
  std::int32_t is_last;

  static constexpr int kGatherers = 128;  // threads that arrive where tokens are gathered

  __device__ void init_barriers(int producers) {
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(&k_full[i], producers);
      mbarrier_init(&k_empty[i], 4);
      mbarrier_init(&v_full[i], producers);
      mbarrier_init(&v_empty[i], 4);
    }
  }
};

/// Ring's walk over as many stages as the launch uses.
struct StageRing {
  const int stages;
  int index = 0;
  std::uint32_t parity = 0;

  __device__ void advance() {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

/// A value that the threads of a warp have in common, so that the compiler knows it too: branches
/// on it cost no bookkeeping, and what follows may be computed once a warp.
__device__ inline int same_in_warp(int value) { return __shfl_sync(0xffffffffU, value, 0); }

__device__ inline int warp_of_block() { return same_in_warp(static_cast<int>(threadIdx.x) / 32); }

/// Byte offset of a 16-byte chunk of a row in a tile of `rows` rows, as SwizzledTile lays it out.
template <typename Layout>
__device__ inline int swizzled_offset(int row, int chunk, int rows) {
  constexpr int kChunks = Layout::kColumns / 8;  // of a box's row
  const int box = chunk / kChunks;
  const int mixed = kChunks == 8 ? (chunk ^ row) & 7 : (chunk ^ (row / 2)) & 3;
  return ((box * rows + row) * kChunks + mixed) * 16;
}

}  // namespace annulus::kernels::sm90
