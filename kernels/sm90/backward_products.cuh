#pragma once

#include "kernels/sm90/backward_fragments.cuh"

/// What the warpgroups of dK and dV share: the five products of a tile, each one committed group,
/// and the way from scores to what is multiplied.
namespace annulus::kernels::sm90 {

/// dK or dV of 64 keys.
template <int kDim>
struct KeyGradient {
  float values[kDim / 2];
};

/// Sᵀ = K·Qᵀ, or dPᵀ = V·dOᵀ, of 64 keys by all queries, or added to what is there; the descriptors
/// are k_major.
template <typename Tile, typename Layout, int kDim>
__device__ inline void issue_scores(float (&s)[Tile::kQueries / 2], std::uint64_t a,
                                    std::uint64_t b, bool accumulate = false) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    WgmmaShape<typename Tile::Element, Tile::kQueries>::shared(
        s, advance(a, Layout::k_major_step(step, Tile::kKeys)),
        advance(b, Layout::k_major_step(step, Tile::kQueries)), step != 0 || accumulate);
  }
  wgmma_commit();
}

/// The same from places in memory; the keys start at `first_key`.
template <typename Tile, typename Layout, int kDim>
__device__ inline void issue_scores(float (&s)[Tile::kQueries / 2],
                                    const typename Tile::Element* keys, int first_key,
                                    const typename Tile::Element* queries) {
  issue_scores<Tile, Layout, kDim>(s, Layout::k_major(keys + first_key * Layout::kColumns),
                                   Layout::k_major(queries));
}

/// dV += Pᵀ·dO, or dK += dSᵀ·Q. `queries`: the address in shared memory.
template <typename Tile, typename Layout, int kDim>
__device__ inline void issue_key_gradient(KeyGradient<kDim>& d,
                                          const std::uint32_t (&weights)[Tile::kQueries / 4],
                                          std::uint32_t queries, bool accumulate) {
  const std::uint64_t b = Layout::n_major(queries, Tile::kQueries);
#pragma unroll
  for (int step = 0; step < Tile::kQueries / 16; ++step) {
    WgmmaShape<typename Tile::Element, kDim>::registers(d.values, &weights[4 * step],
                                                        advance(b, Layout::n_major_step(step)),
                                                        step != 0 || accumulate);
  }
  wgmma_commit();
}

template <typename Tile, typename Layout, int kDim>
__device__ inline void issue_key_gradient(KeyGradient<kDim>& d,
                                          const std::uint32_t (&weights)[Tile::kQueries / 4],
                                          const typename Tile::Element* queries, bool accumulate) {
  issue_key_gradient<Tile, Layout, kDim>(d, weights, shared_address(queries), accumulate);
}

/// Columns of dQ for 64 queries: dQ = dS·K.
template <typename Tile, int kColumns>
__device__ inline void issue_query_gradient(float (&d)[kColumns / 2],
                                            const typename Tile::Element* grad_s,
                                            const typename Tile::Element* keys) {
  const std::uint64_t a = Tile::ScoreTile::n_major(grad_s, Tile::kKeys);
  const std::uint64_t b = Tile::QkTile::n_major(keys, Tile::kKeys);
#pragma unroll
  for (int step = 0; step < Tile::kKeys / 16; ++step) {
    WgmmaShape<typename Tile::Element, kColumns>::transposed(
        d, advance(a, Tile::ScoreTile::n_major_step(step)),
        advance(b, Tile::QkTile::n_major_step(step)), step != 0);
  }
  wgmma_commit();
}

/// Where a warpgroup stands in the rings.
template <typename Tile>
struct Place {
  Ring<Tile::kStages> ring;
  Ring<Tile::kScoreStages> scores;
  Ring<Tile::kKvBuffers> kv;
  int note = 0;

  __device__ void advance() {
    ring.advance();
    scores.advance();
    if (++note == Tile::kNotes) note = 0;
  }
};

/// Clears what a block of Q and dO holds beyond the slice. Both warpgroups write the same zeros;
/// each waits for its own.
template <typename Tile>
__device__ inline void clear_foreign_queries(SharedBackward<Tile>& shared, const Place<Tile>& place,
                                             int barrier) {
  const QueryNote note = broadcast(shared.notes[place.note]);
  const int begin = note.slice_q_begin - note.q_begin;
  const int end = note.slice_q_end - note.q_begin;
  clear_foreign_rows<typename Tile::QkTile, Tile::kQueries, Tile::kQkBoxes>(
      shared.q[place.ring.index], begin, end);
  clear_foreign_rows<typename Tile::VTile, Tile::kQueries, Tile::kVBoxes>(
      shared.grad_o[place.ring.index], begin, end);
  fence_async_shared();
  named_barrier_sync(barrier, 128);
}

template <int kCount>
__device__ inline void cap_scores(float (&s)[kCount], float score_scale) {
#pragma unroll
  for (float& score : s) score = tanh_exp(score * score_scale);
}

/// Soft cap and mask of a warpgroup's scores.
template <bool kSoftCap, typename Tile>
__device__ inline void prepare_scores(const SharedBackward<Tile>& shared,
                                      const BackwardParams& params, int flags,
                                      const Place<Tile>& at, int first_key,
                                      float (&s)[Tile::kQueries / 2]) {
  if constexpr (kSoftCap) cap_scores(s, params.score_scale);
  if ((flags & kPartlyMasked) == 0) [[likely]]
    return;
  const QueryNote note = broadcast(shared.notes[at.note]);
  const KeyItem item = broadcast(shared.items[at.kv.index]);
  const int key = item.k_begin + first_key +
                  static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
  const QueryWindow windows[2] = {query_window(note, key, item.k_end),
                                  query_window(note, key + 8, item.k_end)};
  mask_columns(s, windows);
}

}  // namespace annulus::kernels::sm90
