#pragma once

#include "kernels/sm90/decode_tile.cuh"

/// Multi-head latent attention in absorbed form (DeepSeek-V2, section 2.1): one KV head of 512
/// latent columns, which are the values too, and 64 rotary ones.
///
/// A thread block has 64 rows, whose O fills half of the registers. So two warpgroups hold a half
/// of its columns each, left and right, and take the keys in pairs of blocks, of which each scores
/// one: the left one the first. While one warpgroup is at its softmax the other multiplies. Each
/// gives the other its probabilities, so that both add both blocks' values to their columns
/// ("seesaw", FlashMLA, 2025). Two blocks of keys are all that fits beside Q, so each comes and
/// goes by halves of its columns, and its scores begin when the first box of 64 columns is there.
namespace annulus::kernels::sm90 {

template <typename Element_>
struct LatentTile {
  using Element = Element_;
  static constexpr int kValueDim = 512;
  static constexpr int kHalf = kValueDim / 2;  // a warpgroup's columns of O
  static constexpr int kHeadDim = 576;
  static constexpr int kBlock = 64;
  static constexpr int kThreads = 384;  // a producing and two consuming warpgroups
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  using Layout = SwizzledTile<128>;
  static constexpr int kBoxes = kHeadDim / Layout::kColumns;  // 4 left, 4 right, 1 rotary
  static constexpr int kLeftBoxes = kHalf / Layout::kColumns;
  static constexpr int kBoxElements = kBlock * Layout::kColumns;
};

template <typename Tile>
struct LatentShared {
  using Element = typename Tile::Element;

  alignas(1024) Element q[kWarpgroupRows * Tile::kValueDim];  // rotary columns are in registers
  alignas(1024) Element p[2][kWarpgroupRows * Tile::kBlock];  // of a pair's first, second block
  alignas(1024) Element k[2][Tile::kBlock * Tile::kHeadDim];
  int2 places[2][Tile::kBlock];
  float max[2][kWarpgroupRows];  // in use after the pair's first, second block
  float sum[2][kWarpgroupRows];  // of a warpgroup's own blocks
  DecodeUnit unit;               // that the consumers are at
  union Walker {
    __device__ Walker() {}
    WorkWalker at;
  } walker;
  WorkRun run;
  WorkSum warp_sums[Tile::kThreads / 32];
  std::uint64_t full[2][Tile::kBoxes], empty[2][2];
  std::int32_t more, is_last;

  static constexpr int kGatherers = 128;  // threads that arrive where tokens are gathered

  __device__ void init_barriers(int producers) {
    for (int block = 0; block < 2; ++block) {
      for (std::uint64_t& box : full[block]) mbarrier_init(&box, producers);
      for (std::uint64_t& side : empty[block]) mbarrier_init(&side, 4);
    }
  }
};

/// The second block of a pair may be the next piece's, and is then taken as one of no keys.
template <typename Tile>
__device__ inline void end_with_last_block(DecodeUnit& unit) {
  unit.key_end = min(unit.key_end, unit.load_begin + unit.last_block * Tile::kBlock);
}

}  // namespace annulus::kernels::sm90
