#pragma once

#include "kernels/sm90/backward_pair_tile.cuh"

/// The two warpgroups that hold dV and dK of a block's 64 keys: one computes S, P and dV, the other
/// dP, dS and dK. P changes hands in the element type, in the place that dS then takes.
namespace annulus::kernels::sm90 {

/// dK or dV of a warpgroup's 64 keys, by halves of their columns.
template <int kDim>
struct PairGradient {
  static constexpr int kHalf = kDim / 2;
  float halves[2][kHalf / 2];
};

/// Half of the contraction of Sᵀ = K·Qᵀ or dPᵀ = V·dOᵀ: `keys` holds all kDim columns of 64 keys,
/// `queries` half of those of 64 queries.
template <typename Tile, typename Layout, int kDim>
__device__ inline void issue_half_scores(float (&s)[32], std::uint32_t keys, std::uint32_t queries,
                                         int half) {
  const std::uint64_t a = Layout::k_major(keys + half * kDim * 64);
  const std::uint64_t b = Layout::k_major(queries);
#pragma unroll
  for (int step = 0; step < kDim / 32; ++step) {
    WgmmaShape<typename Tile::Element, 64>::shared(s, advance(a, Layout::k_major_step(step, 64)),
                                                   advance(b, Layout::k_major_step(step, 64)),
                                                   half != 0 || step != 0);
  }
}

/// Half of the columns of dV += Pᵀ·dO or dK += dSᵀ·Q.
template <typename Tile, typename Layout, int kColumns>
__device__ inline void issue_half_gradient(float (&d)[kColumns / 2],
                                           const std::uint32_t (&weights)[16],
                                           std::uint32_t queries, bool accumulate) {
  const std::uint64_t b = Layout::n_major(queries, Tile::kQueries);
#pragma unroll
  for (int step = 0; step < Tile::kQueries / 16; ++step) {
    WgmmaShape<typename Tile::Element, kColumns>::registers(
        d, &weights[4 * step], advance(b, Layout::n_major_step(step)), step != 0 || accumulate);
  }
  wgmma_commit();
}

/// What both have in common.
template <typename Tile>
class PairRole {
 public:
  __device__ PairRole(const BackwardParams& params, SharedPair<Tile>& shared, int barrier)
      : params_(params), shared_(shared), memory_(shared), barrier_(barrier) {}

 protected:
  using Shared = SharedPair<Tile>;
  using Element = typename Tile::Element;

  /// Flags of the next block of queries.
  __device__ int await_queries() const {
    mbarrier_wait(memory_.here(offsetof(Shared, q_full), at_.q.index), at_.q.parity);
    return memory_.flags(at_.note);
  }

  /// The half whose turn it is, in shared memory.
  __device__ std::uint32_t queries() const {
    return memory_.here(offsetof(Shared, q), at_.q.index, sizeof(Shared::q[0]));
  }
  __device__ std::uint32_t grad_o() const {
    return memory_.here(offsetof(Shared, grad_o), at_.grad_o.index, sizeof(Shared::grad_o[0]));
  }

  /// Clears what half of a block of Q or dO holds beyond the slice.
  template <typename Layout, int kColumns>
  __device__ void clear_foreign(Element* half) const {
    const QueryNote note = broadcast(shared_.notes[at_.note]);
    clear_foreign_rows<Layout, Tile::kQueries, kColumns / Layout::kColumns>(
        half, note.slice_q_begin - note.q_begin, note.slice_q_end - note.q_begin);
    fence_async_shared();
    named_barrier_sync(barrier_, 128);
  }

  /// Where this thread's part of P lies: four times 16 bytes, 512 bytes apart, in the place that
  /// dS of its warp's keys takes.
  __device__ uint4* fragments() const {
    return reinterpret_cast<uint4*>(shared_.grad_s[at_.slot.index]) + threadIdx.x % 128 / 32 * 128 +
           threadIdx.x % 32;
  }

  /// Adds or writes the rows of a finished block of keys and gives K and V back.
  template <int kDim>
  __device__ void finish_keys(const GradientRows& rows, const PairGradient<kDim>& gradient,
                              float scale) {
    const KeyItem item = broadcast(shared_.item);
    arrive_warp(&shared_.kv_empty);
    at_.kv_parity ^= 1;
    if (rows.data == nullptr) return;
    const int key = item.k_begin + traded_row();
    float* row = gradient_row(rows, item.batch, key, item.kv_head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      add_rows(gradient.halves[half], scale, row + half * (kDim / 2), key < item.k_end,
               params_.overwrites_kv);
    }
  }

  const BackwardParams& params_;
  SharedPair<Tile>& shared_;
  const PairMemory<Tile> memory_;
  const int barrier_;  // named, of the warpgroup
  PairPlace<Tile> at_;
};

template <typename Tile, bool kSoftCap>
class PairValueRole : PairRole<Tile> {
 public:
  __device__ PairValueRole(const BackwardParams& params, SharedPair<Tile>& shared)
      : Base(params, shared, 1) {}

  __device__ void run() {
    Gradient dv;
    while (true) {
      const int flags = Base::await_queries();
      if ((flags & kNoMoreItems) != 0) return;
      block(flags, dv);
      at_.advance();
      if ((flags & kLastOfItem) != 0) Base::finish_keys(params_.grad_v, dv, 1.0F);
    }
  }

 private:
  using Base = PairRole<Tile>;
  using Shared = SharedPair<Tile>;
  using Element = typename Tile::Element;
  using Gradient = PairGradient<Tile::kValueDim>;
  using QkTile = typename Tile::QkTile;
  using VTile = typename Tile::VTile;
  using Base::at_, Base::memory_, Base::params_, Base::shared_;

  __device__ void block(int flags, Gradient& dv) {
    float s[32];
    std::uint32_t p[16];
    std::uint32_t weights[16];
    const bool first = (flags & kFirstOfItem) != 0;
    if (first) mbarrier_wait(&shared_.k_full, at_.kv_parity);
    const int halves[2] = {at_.q.index, score(s)};
    mbarrier_wait(memory_.here(offsetof(Shared, rows_full), at_.rows.index), at_.rows.parity);
    wgmma_wait<0>();
    pin_registers(s);
    pin_registers(dv.halves[0]);
    pin_registers(dv.halves[1]);
    prepare(flags, s);
    probabilities<Element, kSoftCap>(s, p, weights, shared_.lse[at_.rows.index], params_.exp_scale);
    send(kSoftCap ? weights : p);
    for (const int half : halves) memory_.arrive_both(offsetof(Shared, q_empty), half);
    gradient(flags, p, dv);
  }

  /// Starts the scores; the second half's buffer.
  __device__ int score(float (&s)[32]) {
    const std::uint32_t keys = memory_.here(offsetof(Shared, k));
    wgmma_fence();
    issue_half_scores<Tile, QkTile, Tile::kHeadDim>(s, keys, Base::queries(), 0);
    at_.q.advance();
    mbarrier_wait(memory_.here(offsetof(Shared, q_full), at_.q.index), at_.q.parity);
    issue_half_scores<Tile, QkTile, Tile::kHeadDim>(s, keys, Base::queries(), 1);
    wgmma_commit();
    const int second = at_.q.index;
    at_.q.advance();
    return second;
  }

  /// Soft cap and mask.
  __device__ void prepare(int flags, float (&s)[32]) const {
    if constexpr (kSoftCap) cap_scores(s, params_.score_scale);
    if ((flags & kPartlyMasked) == 0) [[likely]]
      return;
    const QueryNote note = broadcast(shared_.notes[at_.note]);
    const KeyItem item = broadcast(shared_.item);
    const int key =
        item.k_begin + static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
    const QueryWindow windows[2] = {query_window(note, key, item.k_end),
                                    query_window(note, key + 8, item.k_end)};
    mask_columns(s, windows);
  }

  /// The weights of dP, which a soft cap's slope sets apart from P, to a slot whose last dS both
  /// blocks are done with.
  __device__ void send(const std::uint32_t (&weights)[16]) {
    mbarrier_wait(memory_.here(offsetof(Shared, grad_s_empty), at_.slot.index),
                  at_.slot.parity ^ 1);
    uint4* to = Base::fragments();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i * 32] =
          make_uint4(weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3]);
    }
    arrive_warp(memory_.here(offsetof(Shared, p_full), at_.slot.index));
  }

  __device__ void gradient(int flags, std::uint32_t (&p)[16], Gradient& dv) {
    const bool accumulate = (flags & kFirstOfItem) == 0;
    int halves[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      halves[half] = at_.grad_o.index;
      mbarrier_wait(memory_.here(offsetof(Shared, grad_o_full), at_.grad_o.index),
                    at_.grad_o.parity);
      if ((flags & kForeignRows) != 0) [[unlikely]]
        Base::template clear_foreign<VTile, Tile::kVHalf>(shared_.grad_o[at_.grad_o.index]);
      wgmma_fence();
      issue_half_gradient<Tile, VTile, Tile::kVHalf>(dv.halves[half], p, Base::grad_o(),
                                                     accumulate);
      at_.grad_o.advance();
    }
    wgmma_wait<1>();
    memory_.arrive_both(offsetof(Shared, grad_o_empty), halves[0]);
    wgmma_wait<0>();
    pin_registers(dv.halves[0]);
    pin_registers(dv.halves[1]);
    pin_registers(p);
    memory_.arrive_both(offsetof(Shared, grad_o_empty), halves[1]);
  }
};

template <typename Tile>
class PairKeyRole : PairRole<Tile> {
 public:
  __device__ PairKeyRole(const BackwardParams& params, SharedPair<Tile>& shared)
      : Base(params, shared, 2) {}

  __device__ void run() {
    Gradient dk;
    while (true) {
      const int flags = Base::await_queries();
      if ((flags & kNoMoreItems) != 0) break;
      block(flags, dk);
      at_.advance();
      if ((flags & kLastOfItem) != 0) Base::finish_keys(params_.grad_k, dk, params_.scale);
    }
    // The end travels on to the warpgroup of dQ as a note without scores.
    mbarrier_wait(&shared_.grad_s_empty[at_.slot.index], at_.slot.parity ^ 1);
    arrive_warp(&shared_.grad_s_full[at_.slot.index]);
  }

 private:
  using Base = PairRole<Tile>;
  using Shared = SharedPair<Tile>;
  using Element = typename Tile::Element;
  using Gradient = PairGradient<Tile::kHeadDim>;
  using QkTile = typename Tile::QkTile;
  using VTile = typename Tile::VTile;
  using Base::at_, Base::memory_, Base::params_, Base::shared_;
  static constexpr int kWarpBytes = 16 * 128;  // of dS: sixteen keys

  __device__ void block(int flags, Gradient& dk) {
    float dp[32];
    std::uint32_t weights[16];
    std::uint32_t ds[16];
    if ((flags & kFirstOfItem) != 0) mbarrier_wait(&shared_.v_full, at_.kv_parity);
    int halves[2];
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      halves[half] = at_.grad_o.index;
      mbarrier_wait(memory_.here(offsetof(Shared, grad_o_full), at_.grad_o.index),
                    at_.grad_o.parity);
      issue_half_scores<Tile, VTile, Tile::kValueDim>(dp, memory_.here(offsetof(Shared, v)),
                                                      Base::grad_o(), half);
      at_.grad_o.advance();
    }
    wgmma_commit();
    mbarrier_wait(memory_.here(offsetof(Shared, rows_full), at_.rows.index), at_.rows.parity);
    receive(weights);
    wgmma_wait<0>();
    pin_registers(dp);
    pin_registers(dk.halves[0]);
    pin_registers(dk.halves[1]);
    for (const int half : halves) memory_.arrive_both(offsetof(Shared, grad_o_empty), half);
    if ((flags & kPartlyMasked) != 0) [[unlikely]]
      clear_unweighted(weights, dp);
    scores_gradient<Element>(weights, dp, shared_.delta[at_.rows.index], ds);
    send(ds);
    gradient(flags, ds, dk);
  }

  __device__ void receive(std::uint32_t (&weights)[16]) const {
    mbarrier_wait(memory_.here(offsetof(Shared, p_full), at_.slot.index), at_.slot.parity);
    const uint4* from = Base::fragments();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 words = from[i * 32];
      weights[4 * i] = words.x;
      weights[4 * i + 1] = words.y;
      weights[4 * i + 2] = words.z;
      weights[4 * i + 3] = words.w;
    }
  }

  /// dS of a warp's sixteen keys over their P, then to the partner. What comes from there counts
  /// off the barrier too, as much as leaves here.
  __device__ void send(const std::uint32_t (&ds)[16]) const {
    __syncwarp();
    store_gradient<Tile>(ds, shared_.grad_s[at_.slot.index], 0);
    fence_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    const int slot = at_.slot.index;
    const int warp_bytes = static_cast<int>(threadIdx.x % 128 / 32) * kWarpBytes;
    bulk_copy_cluster(
        memory_.there(offsetof(Shared, partner_grad_s), slot, sizeof(Shared::grad_s[0])) +
            warp_bytes,
        memory_.here(offsetof(Shared, grad_s), slot, sizeof(Shared::grad_s[0])) + warp_bytes,
        kWarpBytes, memory_.there(offsetof(Shared, grad_s_full), slot));
    mbarrier_arrive_expect(&shared_.grad_s_full[slot], kWarpBytes);
  }

  __device__ void gradient(int flags, std::uint32_t (&ds)[16], Gradient& dk) {
    const bool accumulate = (flags & kFirstOfItem) == 0;
    int halves[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      halves[half] = at_.q.index;
      mbarrier_wait(memory_.here(offsetof(Shared, q_full), at_.q.index), at_.q.parity);
      if ((flags & kForeignRows) != 0) [[unlikely]]
        Base::template clear_foreign<QkTile, Tile::kQkHalf>(shared_.q[at_.q.index]);
      wgmma_fence();
      issue_half_gradient<Tile, QkTile, Tile::kQkHalf>(dk.halves[half], ds, Base::queries(),
                                                       accumulate);
      at_.q.advance();
    }
    wgmma_wait<1>();
    memory_.arrive_both(offsetof(Shared, q_empty), halves[0]);
    wgmma_wait<0>();
    pin_registers(dk.halves[0]);
    pin_registers(dk.halves[1]);
    pin_registers(ds);
    memory_.arrive_both(offsetof(Shared, q_empty), halves[1]);
  }
};

}  // namespace annulus::kernels::sm90
