#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/sm90/forward_params.hpp"

/// What one launch of the backward kernel gets, by value.
namespace annulus::kernels::sm90 {

/// An fp32 gradient [batch, seq, heads, dim] that the kernel adds to, or writes; dim is contiguous,
/// and rows start at multiples of 16 bytes.
struct GradientRows {
  float* data;  // null: not wanted
  RowStrides strides;
};

struct BackwardParams {
  CUtensorMap q;           // (head_dim, seq_q, q_heads, batch)
  CUtensorMap grad_o;      // (value_dim, seq_q, q_heads, batch)
  CUtensorMap k;           // (head_dim, seq_kv, kv_heads, batch)
  CUtensorMap v;           // (value_dim, seq_kv, kv_heads, batch)
  CUtensorMap grad_q_map;  // (head_dim, seq_q, q_heads, batch)
  CUtensorMap grad_k_map;  // (head_dim, seq_kv, kv_heads, batch)
  CUtensorMap grad_v_map;  // (value_dim, seq_kv, kv_heads, batch)

  const float* lse;
  const float* delta;
  RowStrides lse_strides, delta_strides;
  GradientRows grad_q, grad_k, grad_v;
  bool overwrites_kv;  // else added to, as dQ always is

  // An entry is a block of keys; its slices all cover it and end where it ends.
  const TileSlice* slice_table;
  const TileEntry* entry_table;
  unsigned* ticket;  // 0 before and after each launch

  // Deterministic: who may add to 16 rows of dQ next, by (batch, head, row / 16, block of a
  // cluster), or, where halves of dQ's columns have turns of their own, to a block of queries by
  // the counters of its first rows; else null. Blocks then start at multiples of their size.
  std::uint32_t* turns;
  std::int32_t turn_rows;

  // Work: ticket = (section, entry, unit in section), where a unit is one chunk of the query heads
  // of one KV head of one batch row and a section's units are worked on side by side.
  std::int32_t tickets, entries, units, section_units, batch_units;
  std::int32_t first_kv_head, chunks, chunk_heads;
  std::int32_t seq_q, q_heads, group_size, q_head_offset;

  float score_scale;  // with a soft cap: scale / cap
  float exp_scale;    // log2(e) times scale, or times cap
  float scale;        // of dQ and dK

  // From this entry on several share a block of keys, and add to its dK and dV in any case.
  std::int32_t whole_entries;
};

}  // namespace annulus::kernels::sm90
