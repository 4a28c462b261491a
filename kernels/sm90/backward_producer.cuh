#pragma once

#include "kernels/sm90/backward_rows.cuh"
#include "kernels/sm90/backward_scheduler.cuh"
#include "kernels/sm90/tma.cuh"

/// The producing warp: K and V once a block of keys, then Q and dO of every block of queries that
/// meets it, and their statistics where no other warp loads them. One lane copies.
namespace annulus::kernels::sm90 {

template <typename Tile>
class BackwardProducer {
 public:
  __device__ BackwardProducer(const BackwardParams& params, SharedBackward<Tile>& shared)
      : params_(params),
        shared_(shared),
        rows_(params, shared),
        lane_(static_cast<int>(threadIdx.x % 32)) {}

  __device__ void run() {
    KeyItem item = take_work();
    while (item.ticket < params_.tickets) {
      // Whoever holds a ticket makes all later ones wait: in order, none is taken ahead.
      if constexpr (!Tile::kOrdered) ask_for_work();
      load_keys(item);
      load_queries(item);
      item = take_work();
    }
    mbarrier_wait(&shared_.q_empty[ring_.index], ring_.parity ^ 1);
    if (lane_ == 0) {
      shared_.notes[note_].flags = kNoMoreItems;
      mbarrier_arrive(&shared_.note_full[note_]);
      mbarrier_arrive(&shared_.q_full[ring_.index]);
      if constexpr (Tile::kDrained) mbarrier_arrive(&shared_.q_full[ring_.index]);  // for its rows
    }
  }

 private:
  using Element = typename Tile::Element;

  __device__ KeyItem take_work() {
    if constexpr (Tile::kOrdered) {
      return take_ordered_work<Tile>(params_);
    } else {
      mbarrier_wait(&shared_.work_full, work_parity_);
      work_parity_ ^= 1;
      const KeyItem item = shared_.work;
      __syncwarp();
      return item;
    }
  }

  __device__ void ask_for_work() {
    if (lane_ == 0) mbarrier_arrive(&shared_.work_empty);
  }

  __device__ void load_keys(const KeyItem& item) {
    const int buffer = kv_ring_.index;
    mbarrier_wait(&shared_.kv_empty[buffer], kv_ring_.parity ^ 1);
    kv_ring_.advance();
    if (lane_ != 0) return;
    shared_.items[buffer] = item;
    mbarrier_arrive_expect(&shared_.k_full[buffer], sizeof(shared_.k[0]));
    for (int box = 0; box < Tile::kQkBoxes; ++box) {
      tma_load(&shared_.k[buffer][box * Tile::kKeys * Tile::QkTile::kColumns], &params_.k,
               &shared_.k_full[buffer], CachePolicy::evict_first, box * Tile::QkTile::kColumns,
               item.k_begin, item.kv_head, item.batch);
    }
    mbarrier_arrive_expect(&shared_.v_full[buffer], sizeof(shared_.v[0]));
    for (int box = 0; box < Tile::kVBoxes; ++box) {
      tma_load(&shared_.v[buffer][box * Tile::kKeys * Tile::VTile::kColumns], &params_.v,
               &shared_.v_full[buffer], CachePolicy::evict_first, box * Tile::VTile::kColumns,
               item.k_begin, item.kv_head, item.batch);
    }
  }

  __device__ void load_queries(const KeyItem& item) {
    int remaining = item.blocks;
    int first = kFirstOfItem;
    for (int head = item.head_begin; head < item.head_end; ++head) {
      for (int slice = item.slice_begin; slice < item.slice_end; ++slice) {
        const TileSlice s = params_.slice_table[slice];
        const int2 queries = queries_of(s, item.k_begin, item.k_end);
        if (queries.x > queries.y) continue;  // the first block may begin before both
        for (int q = first_block<Tile>(queries.x); q <= queries.y; q += Tile::kQueries) {
          --remaining;
          if constexpr (Tile::kOrdered)
            turn_ = turn_of<Tile>(params_, item, s, slice, item.k_begin, q, Tile::kKeys);
          load_block(item, s, head, q, first | (remaining == 0 ? kLastOfItem : 0));
          first = 0;
        }
      }
    }
  }

  __device__ void load_block(const KeyItem& item, const TileSlice& s, int head, int q, int flags) {
    const int stage = ring_.index;
    const int q_last = q + Tile::kQueries - 1;
    const bool full = s.q_begin <= q && q_last < s.q_end &&
                      item.k_begin + Tile::kKeys == item.k_end && item.k_end - 1 - q <= s.hi &&
                      item.k_begin - q_last >= s.lo;
    if (!full) flags |= kPartlyMasked;
    if (q < s.q_begin || (q_last >= s.q_end && s.q_end < params_.seq_q)) flags |= kForeignRows;

    const QueryNote note{flags, q, head, item.batch, s.lo, s.hi, s.q_begin, s.q_end};
    if constexpr (Tile::kDrained) {  // dO is given back first
      mbarrier_wait(&shared_.grad_o_empty[stage], ring_.parity ^ 1);
      if (lane_ == 0) {
        tell(note);
        mbarrier_expect(&shared_.q_full[stage], sizeof(shared_.grad_o[0]));
        load_grad_o(note, &shared_.q_full[stage]);
      }
    }
    mbarrier_wait(&shared_.q_empty[stage], ring_.parity ^ 1);
    if (lane_ == 0) {
      if constexpr (!Tile::kDrained) tell(note);
      mbarrier_arrive_expect(&shared_.q_full[stage], sizeof(shared_.q[0]));
      for (int box = 0; box < Tile::kQkBoxes; ++box) {
        tma_load(&shared_.q[stage][box * Tile::kQueries * Tile::QkTile::kColumns], &params_.q,
                 &shared_.q_full[stage], CachePolicy::evict_last, box * Tile::QkTile::kColumns, q,
                 head, item.batch);
      }
    }
    if constexpr (!Tile::kDrained) {
      mbarrier_wait(&shared_.grad_o_empty[stage], ring_.parity ^ 1);
      if (lane_ == 0) {
        mbarrier_arrive_expect(&shared_.grad_o_full[stage], sizeof(shared_.grad_o[0]));
        load_grad_o(note, &shared_.grad_o_full[stage]);
      }
      rows_.load(note);
      rows_.store(stage);
    }
    ring_.advance();
    if (++note_ == Tile::kNotes) note_ = 0;
  }

  __device__ void tell(const QueryNote& note) {
    shared_.notes[note_] = note;
    if constexpr (Tile::kOrdered) shared_.turns[note_] = turn_;
    mbarrier_arrive(&shared_.note_full[note_]);
  }

  __device__ void load_grad_o(const QueryNote& note, std::uint64_t* barrier) {
    for (int box = 0; box < Tile::kVBoxes; ++box) {
      tma_load(&shared_.grad_o[ring_.index][box * Tile::kQueries * Tile::VTile::kColumns],
               &params_.grad_o, barrier, CachePolicy::evict_last, box * Tile::VTile::kColumns,
               note.q_begin, note.head, note.batch);
    }
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  BackwardRows<Tile> rows_;
  const int lane_;
  Ring<Tile::kStages> ring_;
  Ring<Tile::kKvBuffers> kv_ring_;
  int note_ = 0;
  std::uint32_t turn_ = 0;
  std::uint32_t work_parity_ = 0;
};

}  // namespace annulus::kernels::sm90
