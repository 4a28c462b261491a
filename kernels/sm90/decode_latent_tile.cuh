#pragma once

#include "kernels/sm90/decode_tile.cuh"

/// Multi-head latent attention in absorbed form (DeepSeek-V2, section 2.1): one KV head of 512
/// latent columns, which are the values too, and 64 rotary ones.
///
/// Two thread blocks of a cluster share 128 rows and halve the columns: each loads 256 latent and
/// 32 rotary columns of a key, once for scores and values, adds up its part of the scores,
/// exchanges it with its neighbour's, and multiplies the probabilities, which both then have bit
/// for bit, with its 256 value columns. So no byte is loaded twice, and three stages of 64 keys fit
/// beside Q.
namespace annulus::kernels::sm90 {

template <typename Element_>
struct LatentTile {
  using Element = Element_;
  static constexpr int kColumns = 256;  // of the latent part, in this block
  static constexpr int kRotary = 32;
  static constexpr int kAllColumns = 512;  // in both
  static constexpr int kBlock = 64;
  static constexpr int kStages = 3;
  static constexpr int kWarpgroups = 2;  // consumers, 64 rows each
  static constexpr int kThreads = 384;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  using Layout = SwizzledTile<128>;
  using RotaryLayout = SwizzledTile<64>;
  static constexpr int kBoxes = kColumns / Layout::kColumns;
};

/// A tile of rows of Q or of keys.
template <typename Tile, int kRows>
struct LatentRows {
  typename Tile::Element latent[kRows * Tile::kColumns];
  typename Tile::Element rotary[kRows * Tile::kRotary];
};

template <typename Tile>
struct LatentShared {
  alignas(1024) LatentRows<Tile, kWarpgroupRows> q[Tile::kWarpgroups];
  alignas(1024) LatentRows<Tile, Tile::kBlock> k[Tile::kStages];
  // The neighbour's part of the scores: each thread's fragments from the thread of the same place.
  alignas(16) float4 scores[Tile::kWarpgroups][Tile::kBlock / 8][128];
  int2 places[2][Tile::kBlock];
  DecodeUnit units[Tile::kWarpgroups];  // that the consumers are at
  WorkRun run;
  WorkSum warp_sums[Tile::kThreads / 32];
  std::uint64_t full[Tile::kStages], empty[Tile::kStages];
  std::uint64_t scores_full[Tile::kWarpgroups], scores_empty[Tile::kWarpgroups];
  std::int32_t is_last[Tile::kWarpgroups];  // by how many warpgroups ask
};

}  // namespace annulus::kernels::sm90
