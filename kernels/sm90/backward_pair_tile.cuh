#pragma once

#include <cstddef>

#include "kernels/sm90/backward_products.cuh"
#include "kernels/sm90/cluster.cuh"

/// Shape and shared memory of the backward kernel for pairs of thread blocks.
namespace annulus::kernels::sm90 {

/// Q, dO and the accumulators go by halves of their columns: each half has buffers of its own, and
/// each block computes half of dQ.
template <typename Element_, int kHeadDim_, int kValueDim_, int kQueryHalves_, int kGradHalves_,
          int kSlots_>
struct PairTile {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kQueries = 64;  // at a time
  static constexpr int kKeys = 64;     // of a thread block
  static constexpr int kPairKeys = 128;
  static constexpr int kQueryHalves = kQueryHalves_;  // buffers for half of the columns of Q
  static constexpr int kGradHalves = kGradHalves_;    // of dO
  static constexpr int kSlots = kSlots_;              // of dS
  static constexpr int kPieces = 2;  // of dQ on their way out, 16 rows and 32 columns, a warp
  // A note is kept until its dS was read: when Q of the next but one is loaded, dS has a slot.
  static constexpr int kNotes = 2 + kSlots;
  static constexpr int kThreads = 512;
  static constexpr bool kOrdered = false;
  // Of the 512 that four equal shares make.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kKeyRegisters = 192;
  static constexpr int kQueryRegisters = 104;
  static_assert(kProducerRegisters + 2 * kKeyRegisters + kQueryRegisters <= 4 * 128);

  static constexpr int kQkHalf = kHeadDim / 2;  // columns
  static constexpr int kVHalf = kValueDim / 2;
  using QkTile = SwizzledTile<kQkHalf % 64 == 0 ? 128 : 64>;
  using VTile = SwizzledTile<kVHalf % 64 == 0 ? 128 : 64>;
  using ScoreTile = SwizzledTile<128>;  // of dS
  // Of a box of Q or dO: all where each block of the pair can load half of a half's boxes.
  static constexpr int kQueryRows =
      kQkHalf / QkTile::kColumns % 2 == 0 && kVHalf / VTile::kColumns % 2 == 0 ? 64 : 32;
};

template <typename Tile>
struct SharedPair {
  using Element = typename Tile::Element;

  alignas(1024) Element k[64 * Tile::kHeadDim];
  alignas(1024) Element partner_k[64 * Tile::kQkHalf];  // of the columns of dQ computed here
  alignas(1024) Element v[64 * Tile::kValueDim];
  alignas(1024) Element q[Tile::kQueryHalves][64 * Tile::kQkHalf];
  alignas(1024) Element grad_o[Tile::kGradHalves][64 * Tile::kVHalf];
  // [key][64 queries]. Each warp's sixteen keys hold P before, in the order of its fragments.
  alignas(1024) Element grad_s[Tile::kSlots][64 * 64];
  alignas(1024) Element partner_grad_s[Tile::kSlots][64 * 64];
  alignas(1024) float grad_q[4][Tile::kPieces][16 * 32];
  alignas(16) float lse[2][Tile::kQueries];  // in powers of two
  alignas(16) float delta[2][Tile::kQueries];
  alignas(16) QueryNote notes[Tile::kNotes];
  std::uint32_t turns[Tile::kNotes];  // how many others add to these rows of dQ before
  alignas(16) KeyItem item;           // k_begin: of this block's keys; k_end: of the pair's
  alignas(16) KeyItem work;           // of the pair
  std::uint64_t work_full, work_empty;
  std::uint64_t k_full, v_full, kv_empty;
  std::uint64_t q_full[Tile::kQueryHalves], q_empty[Tile::kQueryHalves];
  std::uint64_t grad_o_full[Tile::kGradHalves], grad_o_empty[Tile::kGradHalves];
  std::uint64_t rows_full[2];  // lse and delta; released with Q
  std::uint64_t p_full[Tile::kSlots];
  std::uint64_t grad_s_full[Tile::kSlots];   // the partner's too
  std::uint64_t grad_s_empty[Tile::kSlots];  // and what the partner got
};

/// Where a warpgroup stands in the rings.
template <typename Tile>
struct PairPlace {
  Ring<Tile::kQueryHalves> q;
  Ring<Tile::kGradHalves> grad_o;
  Ring<2> rows;
  Ring<Tile::kSlots> slot;
  std::uint32_t kv_parity = 0;
  int note = 0;

  /// To the next block of queries; the halves advance one by one.
  __device__ void advance() {
    rows.advance();
    slot.advance();
    if (++note == Tile::kNotes) note = 0;
  }
};

/// One block's view of the pair: addresses in its own shared memory and in the partner's.
template <typename Tile>
class PairMemory {
 public:
  using Shared = SharedPair<Tile>;

  __device__ explicit PairMemory(const Shared& shared)
      : base_(static_cast<std::uint32_t>(uniform(static_cast<int>(shared_address(&shared))))),
        there_(static_cast<std::uint32_t>(
            uniform(static_cast<int>(cluster_address(base_, cluster_rank() ^ 1))))) {}

  __device__ std::uint32_t here(std::size_t offset, int index = 0, int bytes = 8) const {
    return base_ + static_cast<std::uint32_t>(offset) + static_cast<std::uint32_t>(index * bytes);
  }
  __device__ std::uint32_t there(std::size_t offset, int index = 0, int bytes = 8) const {
    return there_ + static_cast<std::uint32_t>(offset) + static_cast<std::uint32_t>(index * bytes);
  }

  /// One arrival a warp at a barrier of both blocks.
  __device__ void arrive_both(std::size_t offset, int index) const {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    mbarrier_arrive(here(offset, index));
    mbarrier_arrive_cluster(there(offset, index));
  }

  /// Flags of a note, read by the lane that later tells that the warp is done with it.
  __device__ int flags(int note) const {
    const std::uint32_t at = here(offsetof(Shared, notes), note, sizeof(QueryNote));
    return uniform(threadIdx.x % 32 == 0 ? load_shared_word(at + offsetof(QueryNote, flags)) : 0);
  }

 private:
  std::uint32_t base_, there_;
};

}  // namespace annulus::kernels::sm90
