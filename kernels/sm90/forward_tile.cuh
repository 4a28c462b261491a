#pragma once

#include "kernels/sm90/forward_params.hpp"
#include "kernels/sm90/wgmma.cuh"

/// Shape of the forward kernel's tile and its shared memory.
namespace annulus::kernels::sm90 {

template <typename Element_, int kHeadDim_, int kValueDim_, int kWarpgroups_, int kBlock_,
          int kStages_, int kQueryBuffers_, bool kPingPong_, bool kOverlap_ = true>
struct ForwardTile {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kWarpgroups = kWarpgroups_;  // consumers, 64 rows each
  static constexpr int kBlock = kBlock_;            // keys at a time
  static constexpr int kStages = kStages_;
  static constexpr int kQueryBuffers = kQueryBuffers_;
  static constexpr bool kPingPong = kPingPong_;  // the warpgroups issue in turns
  static constexpr bool kOverlap = kOverlap_;    // softmax runs beside the block before's P·V
  // Passes over the maxima of most blocks. Keys then are held until a block's sums are known, which
  // costs long rows more than it saves.
  static constexpr bool kTrustsMaxima = kHeadDim <= 128;
  // Of a block, whose P·V one after another runs beside the next one's exponentials.
  static constexpr int kParts = kOverlap ? 1 : 2;
  // P is converted beside the exponentials, not after a look at their sums: 1% where warpgroups
  // take no turns, less than nothing where they do.
  static constexpr bool kConvertsEarly = !kPingPong;
  // Each warpgroup passes over the blocks at a tile's begin that it sees nothing of; where they
  // take turns, waiting for one's turn costs what this saves.
  static constexpr bool kPassesOver = !kOverlap && !kPingPong;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  // Where rows of O pass through on their way to the copy engine: in memory of their own, or in
  // that of the tile's queries, which then are given back only when the rows have left. Narrower
  // rows gain nothing.
  enum class Staging { none, own, queries };
  static constexpr int kLoadedBytes =
      2 * (kQueryBuffers * kWarpgroups * 64 * kHeadDim + kStages * kBlock * (kHeadDim + kValueDim));
  static constexpr bool kHasRoom =  // beside notes and barriers
      kLoadedBytes + 2 * kWarpgroups * 64 * kValueDim <= 226 * 1024;
  static constexpr Staging kStaging = kHeadDim < 128 ? Staging::none
                                      : kHasRoom     ? Staging::own
                                      : !kOverlap && kQueryBuffers > 1 && kValueDim <= kHeadDim
                                          ? Staging::queries
                                          : Staging::none;
  // A block gets 168 registers a thread with 384 threads and 128 with 512: what the producer gives
  // up is all that the consumers can get, and asking for more waits for ever. Each side that has
  // too few spills them.
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : kHeadDim < 256 ? 56 : 40;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : kHeadDim < 256 ? 224 : 232;
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <=
                (kWarpgroups == 2 ? 168 * 3 : 128 * 4));

  using QkTile = SwizzledTile<kHeadDim % 64 == 0 ? 128 : 64>;
  using VTile = SwizzledTile<kValueDim % 64 == 0 ? 128 : 64>;
  static constexpr int kQkBoxes = kHeadDim / QkTile::kColumns;
  static constexpr int kVBoxes = kValueDim / VTile::kColumns;
};

enum BlockFlag : int {
  kFirstOfTile = 1,
  kLastOfTile = 2,
  kCutAtEnd = 4,  // keys of another slice's range follow in the block
  kEndOfWork = 8,
  // Shifted by a warpgroup where warpgroups pass over blocks:
  kMasked = 16,   // some of its rows do not keep all keys of the block
  kUnseen = 128,  // none keeps any
};

/// What the producer tells the consumers about one block of keys. Since only the producer walks
/// the slices, the two sides cannot disagree on which blocks exist.
struct BlockNote {
  std::int32_t flags, k_begin, lo, hi;
  std::int32_t q_begin, q_end, k_first, k_end;
};

/// What the scheduler tells the producer: a tile, and the slices that may meet it.
struct alignas(16) TileWork {
  std::int32_t q_begin, q_last, batch, pack_index, kv_head;
  std::int32_t slice_begin, slice_end;
  std::int32_t ticket, blocks;
  std::int32_t skip;   // blocks before the first
  std::int32_t piece;  // 0: the tile is whole; or 1 + the number of the piece
};

struct TileNote {
  std::int32_t q_begin, q_end, unit_head, batch, piece;
};

/// A tile's note is read until its rows are written, one tile after its Q buffer was released.
inline constexpr int kTileNotes = 4;

template <typename Tile>
struct SharedTile {
  using Element = typename Tile::Element;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kBuffers = Tile::kQueryBuffers;

  alignas(1024) Element q[kBuffers][Tile::kWarpgroups][64 * Tile::kHeadDim];
  alignas(1024) Element k[kStages][Tile::kBlock * Tile::kHeadDim];
  alignas(1024) Element v[kStages][Tile::kBlock * Tile::kValueDim];
  alignas(1024) Element o[Tile::kStaging == Tile::Staging::own ? Tile::kWarpgroups : 1]
                         [Tile::kStaging == Tile::Staging::own ? 64 * Tile::kValueDim : 8];
  alignas(16) BlockNote blocks[kStages];
  alignas(16) TileNote tiles[kTileNotes];
  TileWork work;
  std::uint64_t work_full, work_empty;
  std::uint64_t q_full[kBuffers], q_empty[kBuffers];
  std::uint64_t k_full[kStages], k_empty[kStages];
  std::uint64_t v_full[kStages], v_empty[kStages];
};

/// Position in a ring of barriers; the parity flips at each turn.
template <int kSize>
struct Ring {
  int index = 0;
  std::uint32_t parity = 0;

  __device__ void advance() {
    if (++index == kSize) {
      index = 0;
      parity ^= 1;
    }
  }
};

/// A note as lane 0 reads it: the lane that later tells the producer that the warp is done with it.
template <typename Note>
__device__ inline Note broadcast(const Note& shared) {
  Note note{};
  if (threadIdx.x % 32 == 0) note = shared;
  int words[sizeof(Note) / 4];
  memcpy(words, &note, sizeof(Note));
#pragma unroll
  for (int& word : words) word = __shfl_sync(0xffffffffU, word, 0);
  memcpy(&note, words, sizeof(Note));
  return note;
}

}  // namespace annulus::kernels::sm90
