#pragma once

#include <type_traits>

#include "kernels/sm90/forward_epilogue.cuh"
#include "kernels/sm90/forward_rescore.cuh"
#include "kernels/sm90/ring_position.cuh"

/// One consuming warpgroup: 64 rows of S = QKᵀ, softmax and O += PV, a block of keys at a time.
///
/// The loop runs over the blocks of all tiles of this thread block without a break in between: the
/// scores of the next block, of the next tile too, are multiplied beside this block's P·V, and a
/// finished tile is written while the tensor cores work for the other warpgroup. Named barriers
/// let the warpgroups take turns at issuing (FlashAttention-3, section 3.1).
namespace annulus::kernels::sm90 {

inline constexpr int kFirstTurnBarrier = 1;

template <typename Tile, bool kSoftCap>
class ForwardConsumer {
 public:
  using Element = typename Tile::Element;

  __device__ ForwardConsumer(const ForwardParams& params, SharedTile<Tile>& shared, int warpgroup)
      : params_(params),
        shared_(shared),
        warpgroup_(warpgroup),
        headroom_(fminf(kHeadroom / params.exp_scale, 1e30F)) {}

  __device__ void run() {
    if (Tile::kPingPong && warpgroup_ == Tile::kWarpgroups - 1) pass_turn();
    if constexpr (Tile::kOverlap) {
      run_overlapped();
    } else {
      run_serial();
    }
    if (Tile::kStaging != Tile::Staging::none && threadIdx.x % 32 == 0) bulk_wait<0>();
  }

 private:
  static constexpr int kTurnThreads = 256;
  // One number for each ring. At 64 columns, where registers suffice and blocks are short, that
  // costs 1 to 2%.
  static constexpr bool kCounts = Tile::kHeadDim > 64;
  // The place of values from that of keys, and the tile to be written from the one begun.
  static constexpr bool kDerives = kCounts && !Tile::kOverlap;
  // A tile's queries are given back before its last softmax, which does not look at them again.
  static constexpr bool kQueriesEarly = Tile::kQueryBuffers == 1 && !Tile::kTrustsMaxima;
  template <int kSize>
  using Position = std::conditional_t<kCounts, TurnCount<kSize>, TurnPlace<kSize>>;

  __device__ void run_overlapped() {
    float s[Tile::kBlock / 2];
    float o[Tile::kValueDim / 2];
    std::uint32_t p[Tile::kBlock / 4];
    float factor[2];
    RowStatistics rows;

    int flags = await_keys();
    if (flags & kEndOfWork) return;
    start_tile(flags, s, p, rows);
    bool first_of_tile = true;  // of the block whose probabilities p holds
    flags = await_keys();
    while ((flags & kEndOfWork) == 0) {
      if constexpr (Tile::kQueryBuffers == 1) {
        if (flags & kFirstOfTile) {
          finish_values(o, p, first_of_tile);
          issue_first_scores(s);
          write_tile(o, rows);  // beside them
          rows = {};
          finish_first_scores(flags, s, p, rows);
          first_of_tile = true;
          flags = await_keys();
          continue;
        }
      }
      if (flags & kFirstOfTile)
        mbarrier_wait(&shared_.q_full[queries().index()], queries().parity());
      await_turn();
      wgmma_fence();
      issue_scores(s);
      mbarrier_wait(&shared_.v_full[values().index()], values().parity());
      if (cut_) [[unlikely]]
        clear_values_after_end();
      wgmma_fence();
      issue_values(o, p, !first_of_tile);
      pass_turn();
      prefetch_if_last(flags);

      wgmma_wait<1>();
      pin_registers(s);
      prepare_scores(s, flags);
      if constexpr (!Tile::kTrustsMaxima) release_keys();
      if constexpr (kQueriesEarly) {
        if (flags & kLastOfTile) release(&shared_.q_empty[queries().index()]);
      }
      const RowStatistics done = rows;
      if (flags & kFirstOfTile) rows = {};
      const bool renewed = softmax(s, rows, flags, factor);
      if constexpr (Tile::kTrustsMaxima) release_keys();
      pin_registers(s);
      release_queries(flags);
      const int next_flags = await_keys();  // early: its latency passes under P·V
      wgmma_wait<0>();
      pin_registers(o);
      pin_registers(p);
      release_values();
      if (flags & kFirstOfTile) [[unlikely]] {
        write_tile(o, done);
      } else if (renewed) [[unlikely]] {
        scale_rows(o, factor);
      }
      pack_probabilities<Element>(s, p);
      first_of_tile = (flags & kFirstOfTile) != 0;
      flags = next_flags;
    }
    end_tile(o, p, rows, first_of_tile);
  }

  /// P takes the registers of S, which leaves room for three warpgroups and so for tiles of 192
  /// rows, whose keys cost a third less L2 traffic. The others fill the gaps.
  __device__ void run_serial() {
    float s[Tile::kBlock / 2];
    float o[Tile::kValueDim / 2];
    float factor[2];
    RowStatistics rows;

    int flags = await_keys();
    while ((flags & kEndOfWork) == 0) {
      const bool first = (flags & kFirstOfTile) != 0;
      if (first) {
        mbarrier_wait(&shared_.q_full[queries().index()], queries().parity());
        rows = {};
        if constexpr (Tile::kPassesOver) flags = pass_over_unseen(flags) | kFirstOfTile;
      }
      await_turn();
      wgmma_fence();
      issue_scores(s);
      pass_turn();
      prefetch_if_last(flags);
      wgmma_wait<0>();
      pin_registers(s);
      prepare_scores(s, flags);
      const bool look = must_look(flags);
      if (look && look_at_maxima(s, rows, factor) && !first) [[unlikely]]
        scale_rows(o, factor);
      add_part<0>(s, o, rows, look, first);
      release_keys();
      release_queries(flags);
      const int next_flags = await_keys();
      wgmma_wait<0>();
      pin_registers(o);
      release_values();
      if (flags & kLastOfTile) [[unlikely]]
        write_tile(o, rows);
      flags = next_flags;
    }
  }

  /// Once all rows of a warp have a maximum, those of blocks that are not masked are not looked at:
  /// exponentials of larger scores are as exact until they leave the range of P's type. Their sums
  /// show whether they did, and only then are the scores multiplied again and looked at.
  __device__ bool must_look(int flags) const {
    return kSoftCap || !settled_ || masked(flags) || (flags & kFirstOfTile) != 0;
  }

  /// Whether some of this warpgroup's rows do not keep all keys of the block.
  __device__ bool masked(int flags) const {
    return (flags & (Tile::kPassesOver ? kMasked << warpgroup_ : kMasked)) != 0;
  }

  /// Whether some row of the warp renewed its maximum.
  template <int kCount>
  __device__ bool look_at_maxima(const float (&s)[kCount], RowStatistics& rows,
                                 float (&factor)[2]) {
    const bool renewed = renew_maxima(s, rows, params_.exp_scale, headroom_, factor);
    settled_ = __all_sync(0xffffffffU, rows.max[0] > -INFINITY && rows.max[1] > -INFINITY);
    return renewed;
  }

  __device__ bool softmax(float (&s)[Tile::kBlock / 2], RowStatistics& rows, int flags,
                          float (&factor)[2]) {
    if constexpr (!Tile::kTrustsMaxima) {
      return softmax_step(s, rows, params_.exp_scale, headroom_, factor);
    }
    float sum[2];
    bool renewed = false;
    if (must_look(flags)) {
      renewed = look_at_maxima(s, rows, factor);
      exponentials(s, rows, params_.exp_scale, sum);
    } else {
      exponentials(s, rows, params_.exp_scale, sum);
      if (!__all_sync(0xffffffffU, in_range<Element>(sum))) [[unlikely]] {
        renewed = look_again<0>(s, rows, factor);
        exponentials(s, rows, params_.exp_scale, sum);
      }
    }
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
    return renewed;
  }

  /// The scores with the keys from the block's key kFirst on.
  template <int kFirst, int kCount>
  __device__ bool look_again(float (&s)[kCount], RowStatistics& rows, float (&factor)[2]) {
    rescore<Tile>(s, shared_.q[queries().index()][warpgroup_], shared_.k[k_ring_.index()], kFirst);
    return look_at_maxima(s, rows, factor);
  }

  /// Exponentials and P·V of a part of the block's keys: the tensor cores multiply one part beside
  /// the exponentials of the next.
  template <int kPart>
  __device__ void add_part(float (&all)[Tile::kBlock / 2], float (&o)[Tile::kValueDim / 2],
                           RowStatistics& rows, bool looked, bool first) {
    constexpr int kSteps = Tile::kBlock / 16;
    constexpr int kBegin = kSteps * kPart / Tile::kParts;
    constexpr int kEnd = kSteps * (kPart + 1) / Tile::kParts;
    constexpr int kScores = 8 * (kEnd - kBegin);
    auto& s = reinterpret_cast<float(&)[kScores]>(all[8 * kBegin]);
    float sum[2];
    std::uint32_t p[kScores / 2];
    exponentials(s, rows, params_.exp_scale, sum);
    if constexpr (Tile::kConvertsEarly) {
      pack_probabilities<Element>(s, p);
      pin_registers(p);
    }
    if (!looked && !__all_sync(0xffffffffU, in_range<Element>(sum))) [[unlikely]] {
      wgmma_wait<0>();
      pin_registers(o);
      float factor[2];
      if (look_again<16 * kBegin>(s, rows, factor)) scale_rows(o, factor);
      exponentials(s, rows, params_.exp_scale, sum);
      if constexpr (Tile::kConvertsEarly) pack_probabilities<Element>(s, p);
    }
    if constexpr (!Tile::kConvertsEarly) pack_probabilities<Element>(s, p);
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
    if constexpr (kPart == 0) {
      mbarrier_wait(&shared_.v_full[values().index()], values().parity());
      if (cut_) [[unlikely]]
        clear_values_after_end();
    }
    wgmma_fence();
    issue_values<kBegin>(o, p, kPart > 0 || !first);
    if constexpr (kPart + 1 < Tile::kParts) add_part<kPart + 1>(all, o, rows, looked, first);
  }

  /// Blocks at a tile's begin, besides its last, of which none of this warpgroup's rows keeps a
  /// key: what the upper rows meet at a causal edge, and most rows of a tile over several
  /// documents.
  __device__ int pass_over_unseen(int flags) {
    while ((flags & (kUnseen << warpgroup_ | kLastOfTile)) == kUnseen << warpgroup_) {
      release_staging();
      release_keys();
      // Only values that have come may be given back: others may still read those of the turn
      // before.
      mbarrier_wait(&shared_.v_full[values<true>().index()], values<true>().parity());
      flags = await_keys();
      release_values();
    }
    return flags;
  }

  /// Under a tile's last block.
  __device__ void prefetch_if_last(int flags) {
    if ((flags & kLastOfTile) == 0 || !params_.resume) [[likely]]
      return;
    prefetch_state<Tile::kValueDim>(params_, broadcast(shared_.tiles[q_tile_ % kTileNotes]),
                                    warpgroup_);
  }

  /// Of the tile whose scores are being computed.
  __device__ Position<Tile::kQueryBuffers> queries() const {
    if constexpr (kCounts) return {q_tile_};
    return q_ring_;
  }

  /// Serial loops give the keys of a block back before its values.
  template <bool kKeysGone = false>
  __device__ Position<Tile::kStages> values() const {
    if constexpr (kDerives) return kKeysGone ? k_ring_.before() : k_ring_;
    return v_ring_;
  }

  /// Whose output comes next.
  __device__ unsigned tile() const { return kDerives ? q_tile_ - 1 : tile_; }

  __device__ void await_turn() {
    if constexpr (Tile::kPingPong) named_barrier_sync(kFirstTurnBarrier + warpgroup_, kTurnThreads);
  }

  __device__ void pass_turn() {
    if constexpr (Tile::kPingPong) {
      const int next = warpgroup_ == Tile::kWarpgroups - 1 ? 0 : warpgroup_ + 1;
      named_barrier_arrive(kFirstTurnBarrier + next, kTurnThreads);
    }
  }

  __device__ int await_keys() {
    mbarrier_wait(&shared_.k_full[k_ring_.index()], k_ring_.parity());
    return broadcast(shared_.blocks[k_ring_.index()].flags);
  }

  /// Scores and softmax of a tile's first block.
  __device__ void start_tile(int flags, float (&s)[Tile::kBlock / 2],
                             std::uint32_t (&p)[Tile::kBlock / 4], RowStatistics& rows) {
    issue_first_scores(s);
    finish_first_scores(flags, s, p, rows);
  }

  __device__ void issue_first_scores(float (&s)[Tile::kBlock / 2]) {
    mbarrier_wait(&shared_.q_full[queries().index()], queries().parity());
    wgmma_fence();
    issue_scores(s);
  }

  __device__ void finish_first_scores(int flags, float (&s)[Tile::kBlock / 2],
                                      std::uint32_t (&p)[Tile::kBlock / 4], RowStatistics& rows) {
    wgmma_wait<0>();
    pin_registers(s);
    prepare_scores(s, flags);
    if constexpr (kQueriesEarly) {
      if (flags & kLastOfTile) release(&shared_.q_empty[queries().index()]);
    }
    float factor[2];
    softmax(s, rows, flags, factor);
    release_keys();
    release_queries(flags);
    pack_probabilities<Element>(s, p);
  }

  __device__ void end_tile(float (&o)[Tile::kValueDim / 2], std::uint32_t (&p)[Tile::kBlock / 4],
                           const RowStatistics& rows, bool first_of_tile) {
    finish_values(o, p, first_of_tile);
    write_tile(o, rows);
  }

  __device__ void finish_values(float (&o)[Tile::kValueDim / 2],
                                std::uint32_t (&p)[Tile::kBlock / 4], bool first_of_tile) {
    mbarrier_wait(&shared_.v_full[values().index()], values().parity());
    if (cut_) [[unlikely]]
      clear_values_after_end();
    wgmma_fence();
    issue_values(o, p, !first_of_tile);
    wgmma_wait<0>();
    pin_registers(o);
    pin_registers(p);
    release_values();
  }

  __device__ void write_tile(float (&o)[Tile::kValueDim / 2], const RowStatistics& rows) {
    Element* staging = nullptr;
    if constexpr (Tile::kStaging == Tile::Staging::own) staging = shared_.o[warpgroup_];
    if constexpr (Tile::kStaging == Tile::Staging::queries) {
      staging = shared_.q[tile() % Tile::kQueryBuffers][warpgroup_];
      keeps_queries_ = params_.staged;
    }
    finish_tile<Tile>(params_, broadcast(shared_.tiles[tile() % kTileNotes]), warpgroup_, o, rows,
                      staging);
    ++tile_;
  }

  /// Gives back the queries in whose place the tile before was written. Before more keys are waited
  /// for: the producer may be waiting for the queries' place.
  __device__ void release_staging() {
    if constexpr (Tile::kStaging == Tile::Staging::queries) {
      if (!keeps_queries_) [[likely]]
        return;
      keeps_queries_ = false;
      if (threadIdx.x % 32 == 0) bulk_wait_read<0>();
      release(&shared_.q_empty[(q_tile_ - 1) % Tile::kQueryBuffers]);
    }
  }

  __device__ void issue_scores(float (&s)[Tile::kBlock / 2]) {
    using Layout = typename Tile::QkTile;
    const std::uint64_t q = Layout::k_major(shared_.q[queries().index()][warpgroup_]);
    const std::uint64_t k = Layout::k_major(shared_.k[k_ring_.index()]);
#pragma unroll
    for (int step = 0; step < Tile::kHeadDim / 16; ++step) {
      WgmmaShape<Element, Tile::kBlock>::shared(s, q + Layout::k_major_step(step, 64),
                                                k + Layout::k_major_step(step, Tile::kBlock),
                                                step != 0);
    }
    wgmma_commit();
  }

  /// O += P·V for the keys of P, which begin so many sixteens into the block.
  template <int kBegin = 0, int kCount>
  __device__ void issue_values(float (&o)[Tile::kValueDim / 2], const std::uint32_t (&p)[kCount],
                               bool accumulate) {
    using Layout = typename Tile::VTile;
    const std::uint64_t v = Layout::n_major(shared_.v[values().index()], Tile::kBlock);
#pragma unroll
    for (int step = 0; step < kCount / 4; ++step) {
      WgmmaShape<Element, Tile::kValueDim>::registers(
          o, &p[4 * step], v + Layout::n_major_step(kBegin + step), step != 0 || accumulate);
    }
    wgmma_commit();
  }

  /// Soft cap and mask. Remembers what the block's values need.
  __device__ void prepare_scores(float (&s)[Tile::kBlock / 2], int flags) {
    if constexpr (kSoftCap) {
#pragma unroll
      for (int i = 0; i < Tile::kBlock / 2; ++i) s[i] = tanh_exp(s[i] * params_.score_scale);
    }
    cut_ = (flags & kCutAtEnd) != 0;
    if (!masked(flags)) [[likely]]
      return;
    const BlockNote note = broadcast(shared_.blocks[k_ring_.index()]);
    const TileNote tile = broadcast(shared_.tiles[q_tile_ % kTileNotes]);
    const int local_row = static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
    RowWindow windows[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = local_row + 8 * row;
      const int query = params_.pack == 1 ? at : at / params_.pack;
      windows[row] =
          row_window(note, tile.q_begin + warpgroup_ * params_.warpgroup_queries + query);
    }
    mask_scores(s, windows);
    cut_row_ = note.k_end - note.k_begin;
  }

  /// Values behind the slice's end belong to others and may be NaN, which 0·NaN would let in.
  __device__ void clear_values_after_end() {
    constexpr int kChunks = Tile::VTile::kColumns * 2 / 16;
    auto* rows = reinterpret_cast<uint4*>(shared_.v[values().index()]);
    const int chunks = (Tile::kBlock - cut_row_) * kChunks;
    for (int box = 0; box < Tile::kVBoxes; ++box) {
      for (int i = static_cast<int>(threadIdx.x % 128); i < chunks; i += 128) {
        rows[(box * Tile::kBlock + cut_row_) * kChunks + i] = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_shared();
    named_barrier_sync(kFirstTurnBarrier + Tile::kWarpgroups + warpgroup_, 128);
  }

  /// One arrival a warp: it stands for the warp's reads of the notes as well.
  __device__ void release(std::uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  }

  __device__ void release_keys() {
    release(&shared_.k_empty[k_ring_.index()]);
    k_ring_.advance();
  }

  /// Stands between softmax and the wait for P·V on purpose: the assembler hoists that wait over
  /// arithmetic, and the exponentials would start only after P·V, but not over a branch.
  __device__ void release_queries(int flags) {
    release_staging();
    if ((flags & kLastOfTile) == 0) return;
    if (!kQueriesEarly && (Tile::kStaging != Tile::Staging::queries || !params_.staged)) {
      release(&shared_.q_empty[queries().index()]);
    }
    q_ring_.advance();
    ++q_tile_;
  }

  __device__ void release_values() {
    release(&shared_.v_empty[values<true>().index()]);
    v_ring_.advance();
  }

  const ForwardParams& params_;
  SharedTile<Tile>& shared_;
  const int warpgroup_;
  const float headroom_;  // in raw scores
  Position<Tile::kStages> k_ring_, v_ring_;
  Position<Tile::kQueryBuffers> q_ring_;
  unsigned q_tile_ = 0;  // whose scores are being computed
  unsigned tile_ = 0;    // whose output comes next
  bool cut_ = false;
  int cut_row_ = 0;
  bool keeps_queries_ = false;  // their memory holds rows on their way out
  bool settled_ = false;        // all rows of the warp have met a key
};

}  // namespace annulus::kernels::sm90
