#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <cstdint>

/// What one launch of the forward kernel gets, by value.
namespace annulus::kernels::sm90 {

/// A slice of the mask over the keys of one segment; bounds are clipped to ±2^30.
struct TileSlice {
  std::int32_t q_begin, q_end;
  std::int32_t k_begin, k_end;
  std::int32_t lo, hi;
  std::int32_t segment;
  std::int32_t batch_begin;  // backward: the first slice of the batch row in the table
};

/// One row of the work table: a tile of queries and the slices that may meet it.
struct TileEntry {
  std::int32_t q_begin;
  std::int32_t batch;  // -1: every batch row
  std::int32_t slice_begin, slice_end;
};

/// Keys and values that live in one place. Where `ready` is given, the copy engine reads them only
/// after *ready has reached ready_value.
struct KvSegment {
  CUtensorMap k;  // (head_dim, seq_kv, kv_heads, batch)
  CUtensorMap v;  // (value_dim, seq_kv, kv_heads, batch)
  const std::uint32_t* ready;
  std::uint32_t ready_value;
  std::int32_t length;
};

inline constexpr int kMaxSegments = 8;
inline constexpr int kInlineSlices = 8;

/// Element strides of a [batch, seq, heads, dim] output with dim contiguous.
struct RowStrides {
  std::int64_t batch, row, head;
};

struct ForwardParams {
  CUtensorMap q;    // (head_dim, pack, seq_q, q_heads / pack, batch)
  CUtensorMap out;  // (value_dim, seq_q, q_heads, batch), where staged
  KvSegment segments[kMaxSegments];
  TileSlice slices[kInlineSlices];
  const TileSlice* slice_table;  // null: slices
  const TileEntry* entry_table;  // null: every inline slice may meet every tile
  unsigned* ticket;              // 0 before and after each launch

  // Work: ticket = (section, entry, unit in section), where a unit is one pack of query heads of
  // one batch row and a section holds as many units as L2 holds keys and values of. The last
  // entries, the shortest, come after all sections, so that the blocks end together.
  std::int32_t tickets, entries, units, section_units;
  std::int32_t last_entries;
  std::int32_t inline_slices;
  bool last_tile_first;       // order of tiles when there is no table
  bool rows_by_slice;         // a tile of the table ends with the rows of its first slice
  std::int32_t missing_rows;  // of the first tile when there is no table

  // From this ticket on a tile's keys are dealt to several tickets; the last of them to be done
  // merges what each has left in `partials`.
  std::int32_t first_piece, pieces;
  float4* partials;    // [piece][warp][statistics, then O by fours][lane]
  unsigned* arrivals;  // of a tile's warps; 0 before and after each launch

  // A warpgroup's 64 rows are queries × pack heads, heads innermost.
  std::int32_t pack, warpgroup_queries, packs, seq_q;
  std::int32_t group_size, q_head_offset;

  float score_scale;  // with a soft cap: scale / cap
  float exp_scale;    // log2(e) times scale, or times cap
  bool resume;        // merge the state that is there
  bool inputs_ready;  // q, k and v may be read before the launch before this one is done
  bool output_f32;
  bool plain;   // nothing to merge: o and lse in the element type
  bool staged;  // plain, and a tile's rows are those of one head: the copy engine writes them

  const float* sinks;  // null: none, or already in the state
  void* o;             // null: not the last step
  float* lse;
  float* accumulator;  // null: no state
  float* row_max;
  float* row_sum;
  RowStrides o_strides, accumulator_strides;
  RowStrides lse_strides, max_strides, sum_strides;

  // So many tiles are cut; their first pieces, of so many blocks, come before all the others.
  std::int32_t cut_tiles, longest_piece;
};

}  // namespace annulus::kernels::sm90
