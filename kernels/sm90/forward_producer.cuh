#pragma once

#include "kernels/sm90/forward_tile.cuh"
#include "kernels/sm90/tma.cuh"

/// The producing thread: walks tiles and slices, feeds Q, K, V and the notes to the consumers.
namespace annulus::kernels::sm90 {

template <typename Tile>
class ForwardProducer {
 public:
  __device__ ForwardProducer(const ForwardParams& params, SharedTile<Tile>& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    next_ = decode(static_cast<int>(blockIdx.x));
    while (next_.ticket < params_.tickets) {
      // Taken early: the answer is needed only at this tile's last block.
      taken_ = atomicAdd(params_.ticket, 1U);
      load_tile(next_);
    }
    announce_end();
  }

 private:
  struct Work {
    int q_begin, q_last, batch, pack_index, kv_head;
    int slice_begin, slice_end;
    int ticket, blocks;
  };
  static constexpr int kNothing = -1;
  static constexpr int kNoValues = -2;
  struct Keys {
    int k_begin = 0, kv_head = 0, batch = 0, segment = kNothing;
  };

  /// Before a tile's last block, while the ring is full: between two tiles it would hold up loads.
  __device__ void decode_next() {
    // The launch takes `tickets` tickets in all, one of them failing for each block.
    if (taken_ == static_cast<unsigned>(params_.tickets) - 1U) *params_.ticket = 0;
    next_ = decode(static_cast<int>(gridDim.x + taken_));
  }

  __device__ Work decode(int ticket) const {
    const int section_tickets = params_.section_units * params_.entries;
    const int section = ticket / section_tickets;
    const int rest = ticket - section * section_tickets;
    const int first_unit = section * params_.section_units;
    const int units = min(params_.section_units, params_.units - first_unit);
    const int entry = rest / units;
    const int unit = first_unit + rest - entry * units;

    constexpr int kWarpgroups = Tile::kWarpgroups;
    Work work;
    work.ticket = ticket;
    work.blocks = 0;
    if (ticket >= params_.tickets) return work;
    int batch = -1;
    if (params_.entry_table != nullptr) {
      const TileEntry row = params_.entry_table[entry];
      work.q_begin = row.q_begin;
      work.slice_begin = row.slice_begin;
      work.slice_end = row.slice_end;
      batch = row.batch;
    } else {
      const int tile = params_.last_tile_first ? params_.entries - 1 - entry : entry;
      work.q_begin = tile * kWarpgroups * params_.warpgroup_queries;
      work.slice_begin = 0;
      work.slice_end = params_.inline_slices;
    }
    work.batch = batch >= 0 ? batch : unit / params_.packs;
    work.pack_index = batch >= 0 ? unit : unit - work.batch * params_.packs;
    work.q_last = min(work.q_begin + kWarpgroups * params_.warpgroup_queries, params_.seq_q) - 1;
    work.kv_head = (work.pack_index * params_.pack + params_.q_head_offset) / params_.group_size;
    work.blocks = count_blocks(work);
    return work;
  }

  __device__ const TileSlice& slice(int i) const {
    return params_.slice_table != nullptr ? params_.slice_table[i] : params_.slices[i];
  }

  /// Keys of slice s that some row of the tile may see.
  __device__ static int2 keys_of(const Work& work, const TileSlice& s) {
    const int q_begin = max(work.q_begin, s.q_begin);
    const int q_last = min(work.q_last, s.q_end - 1);
    if (q_begin > q_last) return {0, 0};
    return {max(s.k_begin, q_begin + s.lo), min(s.k_end, q_last + s.hi + 1)};
  }

  __device__ int count_blocks(const Work& work) const {
    int blocks = 0;
    for (int i = work.slice_begin; i < work.slice_end; ++i) {
      const int2 keys = keys_of(work, slice(i));
      if (keys.x < keys.y) blocks += (keys.y - keys.x + Tile::kBlock - 1) / Tile::kBlock;
    }
    return blocks;
  }

  __device__ void load_tile(const Work work) {
    int remaining = work.blocks;
    load_queries(work);
    first_ = kFirstOfTile;
    if (remaining == 0) {  // rows without keys still get their O = 0 and LSE = -inf
      decode_next();
      announce_empty_block();
      return;
    }
    for (int i = work.slice_begin; i < work.slice_end; ++i) {
      const TileSlice s = slice(i);
      const int2 keys = keys_of(work, s);
      if (keys.x >= keys.y) continue;
      await_segment(s.segment);
      for (int k = keys.x + (keys.y - keys.x - 1) / Tile::kBlock * Tile::kBlock; k >= keys.x;
           k -= Tile::kBlock) {
        if (--remaining == 0) decode_next();
        load_block(work, s, k, remaining == 0 ? kLastOfTile : 0);
      }
    }
  }

  /// A block without keys: nothing is copied, everything is masked.
  __device__ void announce_empty_block() {
    const int stage = k_ring_.index;
    mbarrier_wait(&shared_.k_empty[stage], k_ring_.parity ^ 1);
    shared_.blocks[stage] = BlockNote{kFirstOfTile | kLastOfTile | kMasked, 0, 0, 0, 0, 0, 0, 0};
    mbarrier_arrive(&shared_.k_full[stage]);
    k_ring_.advance();
    first_ = 0;
    load_pending_values();
    pending_.segment = kNoValues;
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

  __device__ void load_queries(const Work& work) {
    // With one buffer Q waits for the last block's scores, which need that block's V first.
    if constexpr (Tile::kQueryBuffers == 1) load_pending_values();
    const int buffer = q_ring_.index;
    mbarrier_wait(&shared_.q_empty[buffer], q_ring_.parity ^ 1);
    shared_.tiles[tile_ % kTileNotes] =
        TileNote{work.q_begin, work.pack_index * params_.pack, work.batch, 0};
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

  /// K of this block, then V of the block before: the order in which they are consumed.
  __device__ void load_block(const Work& work, const TileSlice& s, int k_begin, int last) {
    const Keys keys{k_begin, work.kv_head, work.batch, s.segment};
    const int stage = k_ring_.index;
    mbarrier_wait(&shared_.k_empty[stage], k_ring_.parity ^ 1);
    int flags = first_ | last;
    const int k_last = k_begin + Tile::kBlock - 1;
    const bool full = s.q_begin <= work.q_begin && work.q_last < s.q_end && k_last < s.k_end &&
                      k_last - work.q_begin <= s.hi && k_begin - work.q_last >= s.lo;
    if (!full) flags |= kMasked;
    if (k_last >= s.k_end && s.k_end < params_.segments[s.segment].length) flags |= kCutAtEnd;
    shared_.blocks[stage] =
        BlockNote{flags, k_begin, s.lo, s.hi, s.q_begin, s.q_end, s.k_begin, s.k_end};
    mbarrier_arrive_expect(&shared_.k_full[stage], sizeof(shared_.k[0]));
    for (int box = 0; box < Tile::kQkBoxes; ++box) {
      tma_load(&shared_.k[stage][box * Tile::kBlock * Tile::QkTile::kColumns],
               &params_.segments[s.segment].k, &shared_.k_full[stage], CachePolicy::evict_last,
               box * Tile::QkTile::kColumns, k_begin, work.kv_head, work.batch);
    }
    k_ring_.advance();
    first_ = 0;
    load_pending_values();
    pending_ = keys;
  }

  __device__ void load_pending_values() {
    if (pending_.segment == kNothing) return;
    const int stage = v_ring_.index;
    mbarrier_wait(&shared_.v_empty[stage], v_ring_.parity ^ 1);
    if (pending_.segment == kNoValues) {
      mbarrier_arrive(&shared_.v_full[stage]);
      v_ring_.advance();
      pending_.segment = kNothing;
      return;
    }
    mbarrier_arrive_expect(&shared_.v_full[stage], sizeof(shared_.v[0]));
    for (int box = 0; box < Tile::kVBoxes; ++box) {
      tma_load(&shared_.v[stage][box * Tile::kBlock * Tile::VTile::kColumns],
               &params_.segments[pending_.segment].v, &shared_.v_full[stage],
               CachePolicy::evict_last, box * Tile::VTile::kColumns, pending_.k_begin,
               pending_.kv_head, pending_.batch);
    }
    v_ring_.advance();
    pending_.segment = kNothing;
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
  Work next_;
  unsigned taken_ = 0;
  unsigned tile_ = 0;
  unsigned seen_ready_ = 0;
  int first_ = 0;
};

}  // namespace annulus::kernels::sm90
