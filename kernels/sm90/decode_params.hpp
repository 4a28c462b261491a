#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <cstdint>

/// What one launch of the decode kernel gets, by value.
namespace annulus::kernels::sm90 {

/// Strides in elements of a [tokens, heads, dim] tensor with dim contiguous.
struct TokenStrides {
  std::int64_t token, head;
};

/// Strides in bytes of a cache [pages, page_size, kv_heads, dim].
struct PageStrides {
  std::int64_t page, token, head;
};

/// What the device divides by: n / value = n · factor / 2^shift for 0 <= n < 2^31, where the factor
/// is the least above 2^shift / value (Granlund and Montgomery, 1994).
struct Divisor {
  std::int32_t value;
  std::uint32_t factor;
  std::int32_t shift;
};

/// Rows of a tile: a warpgroup's.
inline constexpr int kTileRows = 64;

struct DecodeParams {
  CUtensorMap k;  // (head_dim, page_size, kv_heads, pages), boxes of box_tokens tokens
  CUtensorMap v;
  const char* k_data;  // for pages that the copy engine cannot read
  const char* v_data;
  PageStrides k_strides, v_strides;
  std::int32_t box_tokens;  // a power of two; 0: pages are gathered token by token
  std::int32_t boxes;       // in a block of keys
  std::int32_t stages;      // of the rings that are in use
  std::int32_t alignment;   // loads begin at multiples of this power: a box never leaves its page
  std::uint64_t policy;     // of L2

  const void* q;  // [tokens, q_heads, head_dim]
  TokenStrides q_strides;
  const std::int32_t* query_begin;
  const std::int32_t* lengths;
  const std::int32_t* starts;  // null: 0
  const std::int32_t* page_table;
  std::int32_t sequences, max_pages, pages;
  Divisor page_size;

  // The rows of a tile are queries × pack query heads, heads innermost. Part p is pack p and reads
  // KV head p / parts_per_kv_head. The thread blocks form groups of `lanes`: those of a group go
  // through the same keys at the same time, each for its own part, so that a token's row is read at
  // once. A group takes all parts in `rounds`.
  Divisor pack, parts_per_kv_head, lanes, groups;
  std::int32_t parts, rounds;

  // Positions: see CacheDeal and DecodeProblem.
  std::int32_t deal_block, deal_ranks, deal_rank;
  Divisor deal_round;                      // deal_block times deal_ranks
  std::int32_t window_left, window_right;  // -1: unbounded
  bool causal;

  bool capped;
  bool output_f32;
  float score_scale;  // with a soft cap: scale / cap
  float exp_scale;    // log2(e) times scale, or times cap

  const float* sinks;  // null: none
  void* o;             // null: leave a state
  float* lse;
  float* accumulator;
  float* row_max;
  float* row_sum;
  TokenStrides o_strides, accumulator_strides, lse_strides, max_strides, sum_strides;

  // Partial results of tiles whose keys are split: two slots of kTileRows
  // rows a thread block.
  float* partial_o;
  float2* partial_statistics;  // maximum in powers of two, sum
  unsigned* arrivals;          // two a thread block, 0 before and after each launch
};

}  // namespace annulus::kernels::sm90
