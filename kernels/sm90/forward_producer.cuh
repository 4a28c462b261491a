#pragma once

#include "kernels/sm90/forward_scheduler.cuh"
#include "kernels/sm90/launch_early.cuh"
#include "kernels/sm90/tma.cuh"

/// The producing thread: walks a tile's slices, feeds Q, K, V and the notes to the consumers.
namespace annulus::kernels::sm90 {

template <typename Tile>
class ForwardProducer {
 public:
  __device__ ForwardProducer(const ForwardParams& params, SharedTile<Tile>& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    // The next launch comes early only to wait here, or where the end of a tile admits it.
    if (!params_.inputs_ready) {
      await_earlier_launch();
      if (params_.o != nullptr) admit_next_launch();
    }
    TileWork work = take_work();
    while (work.ticket < params_.tickets) {
      load_tile(work);
      work = take_work();
    }
    announce_end();
  }

 private:
  static constexpr int kNothing = -1;
  static constexpr int kNoValues = -2;
  // The next tile is taken when so many blocks of this one are still to be loaded: late, or a
  // multiprocessor with a long tile holds a second one that others could have; early enough for
  // the ticket to come and be decoded meanwhile.
  static constexpr int kClaimAhead = 4;
  static constexpr int kAllMasked = Tile::kPassesOver ? 7 * kMasked : kMasked;
  struct Keys {
    int k_begin = 0, kv_head = 0, batch = 0, segment = kNothing;
  };

  __device__ TileWork take_work() {
    mbarrier_wait(&shared_.work_full, work_parity_);
    work_parity_ ^= 1;
    return shared_.work;
  }

  /// Lets the scheduler take the next ticket.
  __device__ void release_work() { mbarrier_arrive(&shared_.work_empty); }

  __device__ void load_tile(const TileWork& work) {
    int remaining = work.blocks;
    int skip = work.skip;
    if (remaining <= kClaimAhead) release_work();
    if (Tile::kQueryBuffers == 1 || !queries_ahead_) load_queries(work);
    queries_ahead_ = false;
    first_ = kFirstOfTile;
    if (remaining == 0) {  // rows without keys still get their O = 0 and LSE = -inf
      announce_empty_block();
      return;
    }
    for (int i = work.slice_begin; i < work.slice_end; ++i) {
      const TileSlice s = tile_slice(params_, i);
      const int2 keys = keys_of(work, s);
      if (keys.x >= keys.y) continue;
      const int last = (keys.y - keys.x - 1) / Tile::kBlock - skip;
      skip = max(-1 - last, 0);
      if (last < 0) continue;
      await_segment(s.segment);
      const int end = keys.x + max(last - remaining, -1) * Tile::kBlock;
      for (int k = keys.x + last * Tile::kBlock; k > end; k -= Tile::kBlock) {
        load_block(work, s, k, --remaining == 0 ? kLastOfTile : 0);
        if (remaining == kClaimAhead) release_work();
        if (remaining < kClaimAhead) load_queries_ahead();
      }
      if (remaining == 0) return;
    }
  }

  /// A block without keys: nothing is copied, everything is masked.
  __device__ void announce_empty_block() {
    const int stage = k_ring_.index;
    mbarrier_wait(&shared_.k_empty[stage], k_ring_.parity ^ 1);
    shared_.blocks[stage] = BlockNote{kFirstOfTile | kLastOfTile | kAllMasked, 0, 0, 0, 0, 0, 0, 0};
    mbarrier_arrive(&shared_.k_full[stage]);
    first_ = 0;
    load_values_of({0, 0, 0, kNoValues});
  }

  /// Spins until another agent has filled the segment.
  __device__ void await_segment(int segment) {
    const KvSegment& kv = params_.segments[segment];
    if (kv.ready == nullptr || ((seen_ready_ >> segment) & 1U) != 0) return;
    std::uint32_t value = 0;
    do {
      asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(kv.ready) : "memory");
    } while (static_cast<std::int32_t>(value - kv.ready_value) < 0);
    fence_async_global();
    seen_ready_ |= 1U << segment;
  }

  /// The next tile's, as soon as the tile is known: into the other buffer, or where there is none
  /// into L2.
  __device__ void load_queries_ahead() {
    if (queries_ahead_) return;
    if (!mbarrier_test(&shared_.work_full, work_parity_)) return;
    if (shared_.work.ticket < params_.tickets) {
      Tile::kQueryBuffers == 1 ? prefetch_queries(shared_.work) : load_queries(shared_.work);
    }
    queries_ahead_ = true;
  }

  __device__ void prefetch_queries(const TileWork& work) const {
    for (int warpgroup = 0; warpgroup < Tile::kWarpgroups; ++warpgroup) {
      for (int box = 0; box < Tile::kQkBoxes; ++box) {
        tma_prefetch(&params_.q, box * Tile::QkTile::kColumns, 0,
                     work.q_begin + warpgroup * params_.warpgroup_queries, work.pack_index,
                     work.batch);
      }
    }
  }

  __device__ void load_queries(const TileWork& work) {
    // With one buffer Q waits for the last block's scores, which need that block's V first.
    if constexpr (Tile::kQueryBuffers == 1) load_pending_values();
    const int buffer = q_ring_.index;
    mbarrier_wait(&shared_.q_empty[buffer], q_ring_.parity ^ 1);
    shared_.tiles[tile_ % kTileNotes] = TileNote{
        work.q_begin, work.q_last + 1, work.pack_index * params_.pack, work.batch, work.piece};
    const int box_rows = params_.pack * params_.warpgroup_queries;
    mbarrier_arrive_expect(&shared_.q_full[buffer], Tile::kWarpgroups * box_rows * Tile::kHeadDim *
                                                        static_cast<int>(sizeof(Element)));
    for (int warpgroup = 0; warpgroup < Tile::kWarpgroups; ++warpgroup) {
      for (int box = 0; box < Tile::kQkBoxes; ++box) {
        tma_load(&shared_.q[buffer][warpgroup][box * 64 * Tile::QkTile::kColumns], &params_.q,
                 &shared_.q_full[buffer], CachePolicy::evict_first, box * Tile::QkTile::kColumns, 0,
                 work.q_begin + warpgroup * params_.warpgroup_queries, work.pack_index, work.batch);
      }
    }
    q_ring_.advance();
    ++tile_;
  }

  /// The copies go first: what is said about the block is worked out while they fly.
  __device__ void load_block(const TileWork& work, const TileSlice& s, int k_begin, int last) {
    const int stage = k_ring_.index;
    mbarrier_wait(&shared_.k_empty[stage], k_ring_.parity ^ 1);
    mbarrier_expect(&shared_.k_full[stage], sizeof(shared_.k[0]));
    for (int box = 0; box < Tile::kQkBoxes; ++box) {
      tma_load(&shared_.k[stage][box * Tile::kBlock * Tile::QkTile::kColumns],
               &params_.segments[s.segment].k, &shared_.k_full[stage], CachePolicy::evict_last,
               box * Tile::QkTile::kColumns, k_begin, work.kv_head, work.batch);
    }
    shared_.blocks[stage] = BlockNote{flags_of(work, s, k_begin) | first_ | last,
                                      k_begin,
                                      s.lo,
                                      s.hi,
                                      s.q_begin,
                                      s.q_end,
                                      s.k_begin,
                                      s.k_end};
    mbarrier_arrive(&shared_.k_full[stage]);
    first_ = 0;
    load_values_of({k_begin, work.kv_head, work.batch, s.segment});
  }

  __device__ int flags_of(const TileWork& work, const TileSlice& s, int k_begin) const {
    const int k_last = k_begin + Tile::kBlock - 1;
    const int rows = Tile::kWarpgroups * params_.warpgroup_queries;
    const bool full = keeps_all(s, work.q_begin, work.q_last, k_begin, k_last);
    int flags = 0;
    if (!full && k_last >= s.k_end && s.k_end < params_.segments[s.segment].length) {
      flags = kCutAtEnd;
    }
    if constexpr (Tile::kPassesOver) {
      if (full && work.q_last + 1 - work.q_begin == rows) return 0;
#pragma unroll
      for (int warpgroup = 0; warpgroup < Tile::kWarpgroups; ++warpgroup) {
        flags |= flags_of(work, s, k_begin, work.q_begin + warpgroup * params_.warpgroup_queries)
                 << warpgroup;
      }
      return flags;
    }
    return full ? 0 : flags | kMasked;
  }

  __device__ static bool keeps_all(const TileSlice& s, int q_begin, int q_last, int k_begin,
                                   int k_last) {
    return s.q_begin <= q_begin && q_last < s.q_end && k_last < s.k_end &&
           k_last - q_begin <= s.hi && k_begin - q_last >= s.lo;
  }

  /// For the warpgroup whose rows begin there. At a causal edge the upper rows of a tile keep
  /// nothing of a block, and in a tile over several documents most rows do not.
  __device__ int flags_of(const TileWork& work, const TileSlice& s, int k_begin,
                          int rows_begin) const {
    const int rows_last = min(rows_begin + params_.warpgroup_queries - 1, work.q_last);
    const int q_first = max(rows_begin, s.q_begin);
    const int q_last = min(rows_last, s.q_end - 1);
    const int k_first = max(k_begin, s.k_begin);
    const int k_last = min(k_begin + Tile::kBlock, s.k_end) - 1;
    if (q_first > q_last || k_first > k_last || k_first - q_last > s.hi ||
        k_last - q_first < s.lo) {
      return kMasked | kUnseen;
    }
    return keeps_all(s, rows_begin, rows_last, k_begin, k_begin + Tile::kBlock - 1) ? 0 : kMasked;
  }

  /// In the order in which blocks are let go: where the next block's scores run beside these
  /// values' product, its keys come first.
  __device__ void load_values_of(const Keys& keys) {
    if constexpr (Tile::kOverlap) {
      k_ring_.advance();
      load_pending_values();
      pending_ = keys;
    } else {
      load_values(keys, k_ring_);
      k_ring_.advance();
    }
  }

  __device__ void load_pending_values() {
    if (pending_.segment == kNothing) return;
    load_values(pending_, v_ring_);
    v_ring_.advance();
    pending_.segment = kNothing;
  }

  __device__ void load_values(const Keys& keys, const Ring<Tile::kStages>& ring) {
    const int stage = ring.index;
    mbarrier_wait(&shared_.v_empty[stage], ring.parity ^ 1);
    if (keys.segment == kNoValues) {
      mbarrier_arrive(&shared_.v_full[stage]);
    } else {
      mbarrier_arrive_expect(&shared_.v_full[stage], sizeof(shared_.v[0]));
      for (int box = 0; box < Tile::kVBoxes; ++box) {
        tma_load(&shared_.v[stage][box * Tile::kBlock * Tile::VTile::kColumns],
                 &params_.segments[keys.segment].v, &shared_.v_full[stage], CachePolicy::evict_last,
                 box * Tile::VTile::kColumns, keys.k_begin, keys.kv_head, keys.batch);
      }
    }
  }

  __device__ void announce_end() {
    const int stage = k_ring_.index;
    mbarrier_wait(&shared_.k_empty[stage], k_ring_.parity ^ 1);
    shared_.blocks[stage].flags = kEndOfWork;
    mbarrier_arrive(&shared_.k_full[stage]);
    load_pending_values();
  }

  using Element = typename Tile::Element;
  const ForwardParams& params_;
  SharedTile<Tile>& shared_;
  Ring<Tile::kStages> k_ring_, v_ring_;
  Ring<Tile::kQueryBuffers> q_ring_;
  Keys pending_;  // of the block whose K is on its way and whose V is not
  std::uint32_t work_parity_ = 0;
  unsigned tile_ = 0;
  unsigned seen_ready_ = 0;
  int first_ = 0;
  bool queries_ahead_ = false;
};

}  // namespace annulus::kernels::sm90
