#pragma once

#include "kernels/sm90/forward_tile.cuh"

/// The scheduling thread: takes tickets and turns them into tiles. On a thread of its own, because
/// it takes longer than a block of keys does, in which time nothing would be loaded.
namespace annulus::kernels::sm90 {

__device__ inline const TileSlice& tile_slice(const ForwardParams& params, int i) {
  return params.slice_table != nullptr ? params.slice_table[i] : params.slices[i];
}

/// Keys of slice s that some row of the tile may see.
__device__ inline int2 keys_of(const TileWork& work, const TileSlice& s) {
  const int q_begin = max(work.q_begin, s.q_begin);
  const int q_last = min(work.q_last, s.q_end - 1);
  if (q_begin > q_last) return {0, 0};
  return {max(s.k_begin, q_begin + s.lo), min(s.k_end, q_last + s.hi + 1)};
}

template <typename Tile>
class ForwardScheduler {
 public:
  __device__ ForwardScheduler(const ForwardParams& params, SharedTile<Tile>& shared)
      : params_(params), shared_(shared) {}

  /// Publishes one tile ahead of the one being loaded; more would unbalance the blocks' ends.
  __device__ void run() {
    int ticket = static_cast<int>(blockIdx.x);
    for (std::uint32_t parity = 0;; parity ^= 1) {
      shared_.work = decode(ticket);
      mbarrier_arrive(&shared_.work_full);
      if (ticket >= params_.tickets) return;
      mbarrier_wait(&shared_.work_empty, parity);
      const unsigned taken = atomicAdd(params_.ticket, 1U);
      // The launch takes `tickets` tickets in all, one of them failing for each block.
      if (taken == static_cast<unsigned>(params_.tickets) - 1U) *params_.ticket = 0;
      ticket = static_cast<int>(gridDim.x + taken);
    }
  }

 private:
  __device__ TileWork decode(int ticket) const {
    TileWork work;
    work.ticket = ticket;
    work.blocks = 0;
    if (ticket >= params_.tickets) return work;
    const int piece = ticket - params_.first_piece;
    const int2 at =
        entry_and_unit(piece < 0 ? ticket : params_.first_piece + piece % params_.cut_tiles);
    const int entry = at.x;
    const int unit = at.y;

    constexpr int kWarpgroups = Tile::kWarpgroups;
    const int rows = kWarpgroups * params_.warpgroup_queries;
    int batch = -1;
    if (params_.entry_table != nullptr) {
      const TileEntry row = params_.entry_table[entry];
      work.q_begin = row.q_begin;
      work.slice_begin = row.slice_begin;
      work.slice_end = row.slice_end;
      batch = row.batch;
      const int q_end =
          params_.rows_by_slice ? params_.slice_table[row.slice_begin].q_end : params_.seq_q;
      work.q_last = min(work.q_begin + rows, q_end) - 1;
    } else {
      const int tile = params_.last_tile_first ? params_.entries - 1 - entry : entry;
      const int q_begin = tile * rows - params_.missing_rows;
      work.q_begin = max(q_begin, 0);
      work.q_last = min(q_begin + rows, params_.seq_q) - 1;
      work.slice_begin = 0;
      work.slice_end = params_.inline_slices;
    }
    work.batch = batch >= 0 ? batch : unit / params_.packs;
    work.pack_index = batch >= 0 ? unit : unit - work.batch * params_.packs;
    work.kv_head = (work.pack_index * params_.pack + params_.q_head_offset) / params_.group_size;
    work.blocks = count_blocks(work);
    work.skip = 0;
    work.piece = 0;
    if (piece >= 0) take_piece(work, piece);
    return work;
  }

  __device__ void take_piece(TileWork& work, int piece) const {
    const int of_tile = piece / params_.cut_tiles;
    const int first = min(params_.longest_piece, work.blocks);
    const int others = params_.pieces - 1;
    const int begin = of_tile == 0 ? 0 : first + (work.blocks - first) * (of_tile - 1) / others;
    const int end = of_tile == 0 ? first : first + (work.blocks - first) * of_tile / others;
    work.skip = begin;
    work.blocks = end - begin;
    work.piece = 1 + piece % params_.cut_tiles * params_.pieces + of_tile;
  }

  __device__ int2 entry_and_unit(int ticket) const {
    const int entries = params_.entries - params_.last_entries;  // of each section
    const int after_sections = ticket - entries * params_.units;
    if (after_sections >= 0) {
      const int entry = after_sections / params_.units;
      return {entries + entry, after_sections - entry * params_.units};
    }
    const int section_tickets = params_.section_units * entries;
    const int section = ticket / section_tickets;
    const int rest = ticket - section * section_tickets;
    const int first_unit = section * params_.section_units;
    const int units = min(params_.section_units, params_.units - first_unit);
    const int entry = rest / units;
    return {entry, first_unit + rest - entry * units};
  }

  __device__ int count_blocks(const TileWork& work) const {
    int blocks = 0;
    for (int i = work.slice_begin; i < work.slice_end; ++i) {
      const int2 keys = keys_of(work, tile_slice(params_, i));
      if (keys.x < keys.y) blocks += (keys.y - keys.x + Tile::kBlock - 1) / Tile::kBlock;
    }
    return blocks;
  }

  const ForwardParams& params_;
  SharedTile<Tile>& shared_;
};

}  // namespace annulus::kernels::sm90
