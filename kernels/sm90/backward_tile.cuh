#pragma once

#include <type_traits>

#include "kernels/sm90/backward_params.hpp"
#include "kernels/sm90/forward_tile.cuh"

/// Shape of the backward kernel's tile and its shared memory.
namespace annulus::kernels::sm90 {

/// How warpgroups share the five products of a tile. halves: two take all products of 64 keys each,
/// and each a half of dQ's columns. turns: three with 64 keys each, of which one after the other
/// takes all of a block's dQ, where dK and dV leave registers for three. keys: two take all
/// products of 64 keys but dQ, which a third takes, where dQ has no halves of 64 columns.
enum class Division { halves, turns, keys };

template <typename Element_, int kHeadDim_, int kValueDim_, int kQueries_, int kStages_,
          int kKvBuffers_, Division kDivision_, int kScoreStages_ = 2>
struct BackwardTile {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kQueries = kQueries_;  // at a time
  static constexpr Division kDivision = kDivision_;
  static constexpr bool kTurns = kDivision == Division::turns;
  static constexpr bool kDrained = kTurns || kDivision == Division::halves;  // dQ, by a warp
  static constexpr bool kHoldsKeys = kTurns;                                 // a part, in registers
  static constexpr int kGroups = kTurns ? 3 : 2;  // warpgroups with dK and dV, or one of them
  static constexpr int kKeys = 64 * kGroups;
  static constexpr int kStages = kStages_;            // of Q and dO
  static constexpr int kKvBuffers = kKvBuffers_;      // of K and V
  static constexpr int kScoreStages = kScoreStages_;  // of dS
  // A note is kept until its dQ has left. When a block's dO is given back, its own dQ and those of
  // two blocks before may be under way in halves; in turns its own and one for each warpgroup.
  static constexpr int kNotes = kStages + (kTurns ? kGroups + 1 : 3);
  // Producer, those of dK and dV, one for dQ.
  static constexpr int kWarpgroups = 1 + kGroups + (kDrained ? 0 : 1);
  static constexpr int kThreads = kWarpgroups * 128;
  static constexpr bool kOrdered = false;  // additions to dQ in a fixed order
  // What the producer gives up is all that the others can get beyond an equal share of a launch's
  // registers, 168 each of 384 threads or 128 of 512: one too many and a warpgroup waits for ever.
  // dQ's warpgroup holds 64 columns of it at a time, or all 96.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kKeyRegisters = kTurns ? 160 : kDrained ? 240 : kHeadDim == 96 ? 192 : 208;
  static constexpr int kQueryRegisters = 512 - kProducerRegisters - 2 * kKeyRegisters;
  static_assert(kProducerRegisters + kGroups * kKeyRegisters + (kDrained ? 0 : kQueryRegisters) <=
                (kWarpgroups == 3 ? 3 * 168 : 4 * 128));
  static_assert(kQueries % 16 == 0);

  // dQ on its way out. Drained: by warpgroup, 64 columns of all queries; there is room for 64 keys
  // of dK or dV too. Else by warp, pieces of 16 rows and 32 columns.
  static constexpr int kDrainRows = kDrained ? kQueries : 16;
  static constexpr int kPieceRows = kDrained && kQueries < 64 ? 64 : kDrainRows;
  static constexpr int kDrains = kDrained ? kGroups : 4;
  // P, and dS with it, then carries the scale of dQ and dK, and dV is divided by it; f16 would lose
  // small ones by that.
  static constexpr bool kScaledGradient = kDrained && std::is_same_v<Element, __nv_bfloat16>;
  static constexpr int kPieces = kDrained ? 2 : 4;  // of 32 columns
  static_assert(!kDrained || kHeadDim == (kTurns ? 64 : 128));

  using QkTile = SwizzledTile<kHeadDim % 64 == 0 ? 128 : 64>;
  using VTile = SwizzledTile<kValueDim % 64 == 0 ? 128 : 64>;
  // dS. Drained: [key box][query][64 keys]; else [query box][key][64 queries].
  using ScoreTile = SwizzledTile<128>;
  static constexpr int kQkBoxes = kHeadDim / QkTile::kColumns;
  static constexpr int kVBoxes = kValueDim / VTile::kColumns;
};

/// The same tile with additions to dQ in turns: a kernel of its own, because the others have no
/// registers for the waiting.
template <typename Tile>
struct OrderedTile : Tile {
  static constexpr bool kOrdered = true;
};

enum BackwardFlag : int {
  kFirstOfItem = 1,
  kLastOfItem = 2,
  kPartlyMasked = 4,
  kForeignRows = 8,  // rows of the block lie outside the slice
  kNoMoreItems = 16,
};

/// What the producer tells the others about one block of queries.
struct alignas(16) QueryNote {
  std::int32_t flags, q_begin, head, batch;
  std::int32_t lo, hi, slice_q_begin, slice_q_end;
};

/// What the scheduler tells the producer: a block of keys and the heads whose queries it meets.
struct alignas(16) KeyItem {
  std::int32_t ticket, blocks, k_begin, k_end;
  std::int32_t batch, kv_head, head_begin, head_end;
  std::int32_t slice_begin, slice_end, entry;
  std::int32_t overwrites_kv;  // else added to; not set for pairs of blocks
};

template <typename Tile>
struct SharedBackward {
  using Element = typename Tile::Element;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kBuffers = Tile::kKvBuffers;
  static constexpr int kScores = Tile::kScoreStages;

  alignas(1024) Element k[kBuffers][Tile::kKeys * Tile::kHeadDim];
  alignas(1024) Element v[kBuffers][Tile::kKeys * Tile::kValueDim];
  alignas(1024) Element q[kStages][Tile::kQueries * Tile::kHeadDim];
  alignas(1024) Element grad_o[kStages][Tile::kQueries * Tile::kValueDim];
  alignas(1024) Element grad_s[kScores][Tile::kQueries * Tile::kKeys];
  alignas(1024) float grad_q[Tile::kDrains][Tile::kPieces][Tile::kPieceRows * 32];
  alignas(16) float lse[kStages][Tile::kQueries];  // in powers of two
  alignas(16) float delta[kStages][Tile::kQueries];
  alignas(16) QueryNote notes[Tile::kNotes];
  std::uint32_t turns[Tile::kNotes];  // how many others add to these rows of dQ before
  alignas(16) KeyItem items[kBuffers];
  alignas(16) KeyItem work;
  std::uint64_t work_full, work_empty;
  std::uint64_t k_full[kBuffers], v_full[kBuffers], kv_empty[kBuffers];
  std::uint64_t q_full[kStages], q_empty[kStages];  // drained: with grad_o, lse and delta
  std::uint64_t grad_o_full[kStages], grad_o_empty[kStages];
  std::uint64_t rows_full[kStages];  // lse and delta; released with grad_o
  std::uint64_t grad_s_full[kScores], grad_s_empty[kScores];
  std::uint64_t grad_q_full[Tile::kGroups], grad_q_empty[Tile::kGroups];  // by warpgroup
  std::uint64_t note_full[Tile::kNotes];
};

}  // namespace annulus::kernels::sm90
