#pragma once

#include "kernels/sm90/forward_params.hpp"

#ifdef __CUDACC__
#define ANNULUS_BOTH __host__ __device__
#else
#define ANNULUS_BOTH
#endif

/// The order of additions in deterministic mode: blocks of keys from the first to the last, and
/// within one its slices in the order of the table (Hopper's backward kernel).
namespace annulus::kernels::sm90 {

/// How many of the blocks of `keys` keys that a slice's run is cut into, up to block `end`, meet
/// the block of `queries` queries at q.
ANNULUS_BOTH inline int blocks_met(const TileSlice& s, int q, int queries, int keys, int end) {
  const int last_query = (q + queries < s.q_end ? q + queries : s.q_end) - 1;
  const int first_query = q > s.q_begin ? q : s.q_begin;
  if (first_query > last_query) return 0;
  const int first_key = first_query + s.lo > s.k_begin ? first_query + s.lo : s.k_begin;
  const int last_key = last_query + s.hi < s.k_end ? last_query + s.hi : s.k_end - 1;
  if (first_key >= s.k_end || last_key < s.k_begin) return 0;
  const int low = (first_key - s.k_begin) / keys;
  const int high = (last_key - s.k_begin) / keys;
  const int count = (high < end ? high + 1 : end) - low;
  return count > 0 ? count : 0;
}

/// Of slice s, at place `index` in the table: how many additions to the block of queries come
/// before that of slice `own` of the block of keys at k_begin, whose slices begin at `run_begin`.
/// Slices of earlier runs have all their blocks before it.
ANNULUS_BOTH inline int turns_before(const TileSlice& s, int index, int run_begin, int own,
                                     int k_begin, int q, int queries, int keys) {
  if (index < run_begin) return blocks_met(s, q, queries, keys, 1 << 30);
  const int block = (k_begin - s.k_begin) / keys;
  return blocks_met(s, q, queries, keys, index < own ? block + 1 : block);
}

}  // namespace annulus::kernels::sm90

#undef ANNULUS_BOTH
