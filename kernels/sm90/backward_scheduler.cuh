#pragma once

#include "kernels/sm90/backward_tile.cuh"
#include "kernels/sm90/backward_turns.hpp"

/// The scheduling thread: takes tickets and turns them into blocks of keys with their heads.
namespace annulus::kernels::sm90 {

/// Queries of slice s, first to last, that see some key of [k_begin, k_end).
__device__ inline int2 queries_of(const TileSlice& s, int k_begin, int k_end) {
  return {max(s.q_begin, k_begin - s.hi), min(s.q_end - 1, k_end - 1 - s.lo)};
}

/// Where the blocks over them begin.
template <typename Tile>
__device__ inline int first_block(int q) {
  return Tile::kOrdered ? q / Tile::kQueries * Tile::kQueries : q;
}

/// Blocks of queries of one head that meet the keys.
template <typename Tile>
__device__ inline int query_blocks(const BackwardParams& params, const KeyItem& item) {
  int blocks = 0;
  for (int i = item.slice_begin; i < item.slice_end; ++i) {
    const int2 queries = queries_of(params.slice_table[i], item.k_begin, item.k_end);
    if (queries.x <= queries.y) {
      const int q = first_block<Tile>(queries.x);
      blocks += (queries.y - q + Tile::kQueries) / Tile::kQueries;
    }
  }
  return blocks;
}

/// What a ticket stands for, in blocks of `keys` keys.
template <typename Tile>
__device__ inline KeyItem key_item(const BackwardParams& params, int ticket, int keys) {
  KeyItem item{};
  item.ticket = ticket;
  if (ticket >= params.tickets) return item;
  const int section_tickets = params.section_units * params.entries;
  const int section = ticket / section_tickets;
  const int rest = ticket - section * section_tickets;
  const int first_unit = section * params.section_units;
  const int units = min(params.section_units, params.units - first_unit);
  const int entry = rest / units;
  const int unit = first_unit + rest - entry * units;

  const TileEntry row = params.entry_table[entry];
  item.batch = row.batch >= 0 ? row.batch : unit / params.batch_units;
  const int in_batch = row.batch >= 0 ? unit : unit - item.batch * params.batch_units;
  const int kv_index = in_batch / params.chunks;
  const int chunk = in_batch - kv_index * params.chunks;
  item.kv_head = params.first_kv_head + kv_index;
  const int group_begin = item.kv_head * params.group_size - params.q_head_offset;
  const int group_end = min(group_begin + params.group_size, params.q_heads);
  const int begin = group_begin + chunk * params.chunk_heads;
  item.head_begin = max(begin, 0);
  item.head_end = min(begin + params.chunk_heads, group_end);
  item.entry = entry;
  item.slice_begin = row.slice_begin;
  item.slice_end = row.slice_end;
  item.k_begin = row.q_begin;
  item.k_end = min(row.q_begin + keys, params.slice_table[row.slice_begin].k_end);
  item.blocks = max(item.head_end - item.head_begin, 0) * query_blocks<Tile>(params, item);
  return item;
}

/// Additions to the queries from `q` on that come before those of slice s of an item's keys, in
/// blocks of `keys` keys, the first at k_begin. Tickets are taken in the order of entries, from the
/// first keys to the last, so that whoever waits for a turn waits for earlier tickets. All lanes of
/// a warp.
template <typename Tile>
__device__ inline std::uint32_t turn_of(const BackwardParams& params, const KeyItem& item,
                                        const TileSlice& s, int slice, int k_begin, int q,
                                        int keys) {
  if (item.slice_end - s.batch_begin == 1) {  // alone: the table, which L1 forgets, is not needed
    return static_cast<std::uint32_t>(
        turns_before(s, slice, slice, slice, k_begin, q, Tile::kQueries, keys));
  }
  const int lane = static_cast<int>(threadIdx.x % 32);
  int earlier = 0;
  for (int i = s.batch_begin + lane; i < item.slice_end; i += 32) {
    earlier += turns_before(params.slice_table[i], i, item.slice_begin, slice, k_begin, q,
                            Tile::kQueries, keys);
  }
  return __reduce_add_sync(0xffffffffU, static_cast<unsigned>(earlier));
}

/// In order: what the next ticket that has work stands for, or one past the last, for all lanes of
/// a warp. Only what runs holds a ticket, so that who waits for a turn waits for blocks that run.
template <typename Tile>
__device__ inline KeyItem take_ordered_work(const BackwardParams& params) {
  while (true) {
    unsigned taken = 0;
    if (threadIdx.x % 32 == 0) {
      taken = atomicAdd(params.ticket, 1U);
      // The launch takes `tickets` tickets in all and a failing one for each block.
      if (taken == static_cast<unsigned>(params.tickets) + gridDim.x - 1) *params.ticket = 0;
    }
    KeyItem item =
        key_item<Tile>(params, __shfl_sync(0xffffffffU, static_cast<int>(taken), 0), Tile::kKeys);
    item.overwrites_kv = params.overwrites_kv ? 1 : 0;
    if (item.ticket >= params.tickets || item.blocks > 0) return item;
  }
}

template <typename Tile>
class BackwardScheduler {
 public:
  __device__ BackwardScheduler(const BackwardParams& params, SharedBackward<Tile>& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    int ticket = static_cast<int>(blockIdx.x);
    std::uint32_t parity = 1;  // of the release of the slot before
    while (true) {
      KeyItem item = key_item<Tile>(params_, ticket, Tile::kKeys);
      const bool last = ticket >= params_.tickets;
      if (last || item.blocks > 0) {
        mbarrier_wait(&shared_.work_empty, parity);
        parity ^= 1;
        item.overwrites_kv = params_.overwrites_kv && item.entry < params_.whole_entries ? 1 : 0;
        shared_.work = item;
        mbarrier_arrive(&shared_.work_full);
      }
      if (last) return;
      const unsigned taken = atomicAdd(params_.ticket, 1U);
      // The launch takes `tickets` tickets in all, one of them failing for each block.
      if (taken == static_cast<unsigned>(params_.tickets) - 1U) *params_.ticket = 0;
      ticket = static_cast<int>(gridDim.x + taken);
    }
  }

 private:
  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
};

}  // namespace annulus::kernels::sm90
