#pragma once

#include <cmath>

#include "kernels/sm90/backward_pair_tile.cuh"
#include "kernels/sm90/backward_scheduler.cuh"

/// What loads: a thread of the first block that takes tickets for both, and in each block a warp
/// that loads K and V once a block of keys, then Q, dO and their statistics for every block of
/// queries. Both walk the same blocks of queries, so that neither waits for a dS that never comes.
namespace annulus::kernels::sm90 {

template <typename Tile>
class PairScheduler {
 public:
  __device__ PairScheduler(const BackwardParams& params, SharedPair<Tile>& shared)
      : params_(params), shared_(shared), memory_(shared) {}

  __device__ void run() {
    using Shared = SharedPair<Tile>;
    if (threadIdx.x % 32 != 0) return;
    // In order, only what runs holds a ticket: who waits for a turn waits for clusters that run.
    int ticket = Tile::kOrdered ? take_ticket() : static_cast<int>(blockIdx.x) / 2;
    std::uint32_t parity = 1;  // of the release of the slot before
    while (true) {
      const KeyItem item = key_item<Tile>(params_, ticket, Tile::kPairKeys);
      const bool last = ticket >= params_.tickets;
      if (last || item.blocks > 0) {
        mbarrier_wait(&shared_.work_empty, parity);
        parity ^= 1;
        shared_.work = item;
        mbarrier_arrive(&shared_.work_full);
        for (int i = 0; i < 3; ++i) {
          store_cluster(memory_.there(offsetof(Shared, work), i, 16),
                        reinterpret_cast<const int4*>(&item)[i],
                        memory_.there(offsetof(Shared, work_full)));
        }
      }
      if (last) return;
      if constexpr (Tile::kOrdered) {
        if (item.blocks > 0) mbarrier_wait(&shared_.work_empty, parity);
      }
      ticket = take_ticket();
    }
  }

 private:
  /// All tickets are taken, and one too many by each cluster.
  __device__ int take_ticket() const {
    const int clusters = static_cast<int>(gridDim.x) / 2;
    const int first = Tile::kOrdered ? 0 : clusters;  // those before go by the cluster's number
    const int taken = static_cast<int>(atomicAdd(params_.ticket, 1U));
    if (taken == params_.tickets + clusters - first - 1) *params_.ticket = 0;
    return first + taken;
  }

  const BackwardParams& params_;
  SharedPair<Tile>& shared_;
  const PairMemory<Tile> memory_;
};

template <typename Tile>
class PairProducer {
 public:
  __device__ PairProducer(const BackwardParams& params, SharedPair<Tile>& shared)
      : params_(params),
        shared_(shared),
        memory_(shared),
        rank_(cluster_rank()),
        lane_(static_cast<int>(threadIdx.x % 32)) {}

  __device__ void run() {
    while (take_work()) {
      // Whoever holds a ticket makes all later ones wait: in order, none is taken ahead.
      if constexpr (!Tile::kOrdered) ask_for_work();
      load_keys();
      load_queries();
      if constexpr (Tile::kOrdered) ask_for_work();
    }
    mbarrier_wait(&shared_.q_empty[q_.index], q_.parity ^ 1);
    if (lane_ == 0) {
      shared_.notes[note_].flags = kNoMoreItems;
      mbarrier_arrive(&shared_.q_full[q_.index]);
    }
  }

 private:
  using Shared = SharedPair<Tile>;
  using Element = typename Tile::Element;
  /// In order a copy, because to look for turns empties L1 again and again.
  using SliceView = std::conditional_t<Tile::kOrdered, TileSlice, const TileSlice&>;

  /// The next block of keys to the place where all find it, once all are done with the last.
  __device__ bool take_work() {
    if (rank_ != 0 && lane_ == 0) mbarrier_arrive_expect(&shared_.work_full, sizeof(KeyItem));
    mbarrier_wait(&shared_.work_full, work_parity_);
    work_parity_ ^= 1;
    const bool more = shared_.work.ticket < params_.tickets;
    __syncwarp();
    if (!more) return false;
    mbarrier_wait(&shared_.kv_empty, kv_parity_ ^ 1);
    kv_parity_ ^= 1;
    if (lane_ == 0) {
      KeyItem item = shared_.work;
      item.k_begin += rank_ * Tile::kKeys;
      shared_.item = item;
    }
    __syncwarp();
    return true;
  }

  __device__ void ask_for_work() const {
    if (lane_ != 0) return;
    rank_ == 0 ? mbarrier_arrive(&shared_.work_empty)
               : mbarrier_arrive_cluster(memory_.there(offsetof(Shared, work_empty)));
  }

  __device__ void load_keys() {
    if (lane_ != 0) return;
    const int k_begin = shared_.item.k_begin;
    const int partner_begin = k_begin + (1 - 2 * rank_) * Tile::kKeys;
    mbarrier_arrive_expect(&shared_.k_full, sizeof(shared_.k) + sizeof(shared_.partner_k));
    load_columns<typename Tile::QkTile, Tile::kHeadDim>(shared_.k, &params_.k, &shared_.k_full, 0,
                                                        k_begin);
    load_columns<typename Tile::QkTile, Tile::kQkHalf>(
        shared_.partner_k, &params_.k, &shared_.k_full, rank_ * Tile::kQkHalf, partner_begin);
    mbarrier_arrive_expect(&shared_.v_full, sizeof(shared_.v));
    load_columns<typename Tile::VTile, Tile::kValueDim>(shared_.v, &params_.v, &shared_.v_full, 0,
                                                        k_begin);
  }

  /// kCount columns from `column` of 64 keys.
  template <typename Layout, int kCount>
  __device__ void load_columns(Element* to, const CUtensorMap* map, std::uint64_t* barrier,
                               int column, int row) const {
    for (int i = 0; i < kCount; i += Layout::kColumns) {
      tma_load(to + i * 64, map, barrier, CachePolicy::evict_first, column + i, row,
               shared_.item.kv_head, shared_.item.batch);
    }
  }

  __device__ void load_queries() {
    const KeyItem& item = shared_.item;
    const int pair_begin = item.k_begin - rank_ * Tile::kKeys;
    int remaining = item.blocks;
    int first = kFirstOfItem;
    for (int head = item.head_begin; head < item.head_end; ++head) {
      for (int slice = item.slice_begin; slice < item.slice_end; ++slice) {
        const SliceView s = params_.slice_table[slice];
        const int2 queries = queries_of(s, pair_begin, item.k_end);
        if (queries.x > queries.y) continue;  // the first block may begin before both
        for (int q = first_block<Tile>(queries.x); q <= queries.y; q += Tile::kQueries) {
          --remaining;
          if constexpr (Tile::kOrdered)
            turn_ = turn_of<Tile>(params_, item, s, slice, pair_begin, q, Tile::kPairKeys);
          load_block(s, head, q, first | (remaining == 0 ? kLastOfItem : 0));
          first = 0;
        }
      }
    }
  }

  __device__ QueryNote note_of(const TileSlice& s, int head, int q, int flags) const {
    const int q_last = q + Tile::kQueries - 1;
    const int k_begin = shared_.item.k_begin;
    const int k_last = k_begin + Tile::kKeys - 1;
    const bool full = s.q_begin <= q && q_last < s.q_end && k_last < shared_.item.k_end &&
                      k_last - q <= s.hi && k_begin - q_last >= s.lo;
    if (!full) flags |= kPartlyMasked;
    if (q < s.q_begin || (q_last >= s.q_end && s.q_end < params_.seq_q)) flags |= kForeignRows;
    return {flags, q, head, shared_.item.batch, s.lo, s.hi, s.q_begin, s.q_end};
  }

  __device__ void load_block(const TileSlice& s, int head, int q, int flags) {
    const int batch = shared_.item.batch;
    mbarrier_wait(&shared_.q_empty[q_.index], q_.parity ^ 1);
    if (lane_ == 0) {
      shared_.notes[note_] = note_of(s, head, q, flags);
      if constexpr (Tile::kOrdered) shared_.turns[note_] = turn_;
    }
    load_half<typename Tile::QkTile, Tile::kQkHalf>(shared_.q[q_.index], &params_.q,
                                                    &shared_.q_full[q_.index], 0, q, head, batch);
    q_.advance();
    load_statistics(s, head, q, batch);
    mbarrier_wait(&shared_.q_empty[q_.index], q_.parity ^ 1);
    load_half<typename Tile::QkTile, Tile::kQkHalf>(shared_.q[q_.index], &params_.q,
                                                    &shared_.q_full[q_.index], 1, q, head, batch);
    q_.advance();
    store_statistics();
    for (int half = 0; half < 2; ++half) {
      mbarrier_wait(&shared_.grad_o_empty[grad_o_.index], grad_o_.parity ^ 1);
      load_half<typename Tile::VTile, Tile::kVHalf>(shared_.grad_o[grad_o_.index], &params_.grad_o,
                                                    &shared_.grad_o_full[grad_o_.index], half, q,
                                                    head, batch);
      grad_o_.advance();
    }
    if (++note_ == Tile::kNotes) note_ = 0;
  }

  /// Half of the columns of a block of Q or dO: half of their boxes, to both blocks of the pair.
  template <typename Layout, int kCount>
  __device__ void load_half(Element* to, const CUtensorMap* map, std::uint64_t* barrier, int half,
                            int q, int head, int batch) const {
    if (lane_ != 0) return;
    constexpr int kRows = Tile::kQueryRows;
    constexpr int kBoxes = kCount / Layout::kColumns * (Tile::kQueries / kRows);
    static_assert(kBoxes % 2 == 0);
    mbarrier_arrive_expect(barrier, kCount * Tile::kQueries * sizeof(Element));
#pragma unroll 1
    for (int i = 0; i < kBoxes / 2; ++i) {
      const int box = rank_ * (kBoxes / 2) + i;
      const int column = box / (Tile::kQueries / kRows) * Layout::kColumns;
      const int row = box % (Tile::kQueries / kRows) * kRows;
      tma_load_both(to + column * Tile::kQueries + row * Layout::kColumns, map, barrier,
                    CachePolicy::evict_last, half * kCount + column, q + row, head, batch);
    }
  }

  __device__ void load_statistics(const TileSlice& s, int head, int q, int batch) {
    const RowStrides& of_lse = params_.lse_strides;
    const RowStrides& of_delta = params_.delta_strides;
    const float* lse = params_.lse + batch * of_lse.batch + head * of_lse.head;
    const float* delta = params_.delta + batch * of_delta.batch + head * of_delta.head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = q + lane_ + 32 * i;
      const bool valid = row >= s.q_begin && row < s.q_end;
      lse_[i] = valid ? lse[row * of_lse.row] : -INFINITY;
      delta_[i] = valid ? delta[row * of_delta.row] : 0.0F;
    }
  }

  /// A row without keys (LSE -inf) or outside the slice gets LSE +inf, so that P = exp2(S - inf) =
  /// 0, and δ 0.
  __device__ void store_statistics() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool empty = lse_[i] == -INFINITY;
      shared_.lse[rows_][lane_ + 32 * i] = empty ? INFINITY : lse_[i] * 1.4426950408889634F;
      shared_.delta[rows_][lane_ + 32 * i] = empty ? 0.0F : delta_[i];
    }
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(&shared_.rows_full[rows_]);
    rows_ ^= 1;
  }

  const BackwardParams& params_;
  SharedPair<Tile>& shared_;
  const PairMemory<Tile> memory_;
  const int rank_;
  const int lane_;
  Ring<Tile::kQueryHalves> q_;
  Ring<Tile::kGradHalves> grad_o_;
  int note_ = 0;
  int rows_ = 0;
  std::uint32_t turn_ = 0;
  std::uint32_t work_parity_ = 0;
  std::uint32_t kv_parity_ = 0;
  float lse_[2], delta_[2];
};

}  // namespace annulus::kernels::sm90
