#pragma once

#include "kernels/sm90/backward_keys.cuh"

/// The division for head dimensions over 128: both warpgroups work on the same 64 keys, one on S,
/// P and dV, the other on dP, dS and dK. P changes hands in the element type, as dV's product
/// takes it, in the order of the fragments: both hold the same pairs.
namespace annulus::kernels::sm90 {

/// Adds or writes the rows of a finished block of keys and gives K and V back.
template <typename Tile, int kDim>
__device__ inline void finish_keys(SharedBackward<Tile>& shared, Place<Tile>& place,
                                   const GradientRows& rows, const KeyGradient<kDim>& gradient,
                                   float scale, bool overwrite) {
  const KeyItem item = broadcast(shared.items[place.kv.index]);
  arrive_warp(&shared.kv_empty[place.kv.index]);
  place.kv.advance();
  if (rows.data == nullptr) return;
  const int key = item.k_begin + traded_row();
  add_rows(gradient, scale, gradient_row(rows, item.batch, key, item.kv_head), key < item.k_end,
           overwrite);
}

/// Clears what a block of Q or dO holds beyond the slice.
template <typename Tile, typename Layout, int kBoxes>
__device__ inline void clear_foreign_queries(SharedBackward<Tile>& shared, const Place<Tile>& place,
                                             typename Tile::Element* rows, int barrier) {
  const QueryNote note = broadcast(shared.notes[place.note]);
  clear_foreign_rows<Layout, Tile::kQueries, kBoxes>(rows, note.slice_q_begin - note.q_begin,
                                                     note.slice_q_end - note.q_begin);
  fence_async_shared();
  named_barrier_sync(barrier, 128);
}

template <typename Tile, bool kSoftCap>
class BackwardValueRole {
 public:
  __device__ BackwardValueRole(const BackwardParams& params, SharedBackward<Tile>& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    KeyGradient<Tile::kValueDim> dv;
    while (true) {
      mbarrier_wait(&shared_.q_full[at_.ring.index], at_.ring.parity);
      const int flags = broadcast(shared_.notes[at_.note].flags);
      if (flags & kNoMoreItems) return;
      block(flags, dv);
      at_.advance();
      if (flags & kLastOfItem)
        finish_keys(shared_, at_, params_.grad_v, dv, 1.0F, params_.overwrites_kv);
    }
  }

 private:
  using Element = typename Tile::Element;
  static constexpr int kCount = Tile::kQueries / 2;

  __device__ void block(int flags, KeyGradient<Tile::kValueDim>& dv) {
    float s[kCount];
    std::uint32_t p[kCount / 2];
    std::uint32_t weights[kCount / 2];
    const bool first = (flags & kFirstOfItem) != 0;
    const int stage = at_.ring.index;
    if (first) mbarrier_wait(&shared_.k_full[at_.kv.index], at_.kv.parity);
    wgmma_fence();
    issue_scores<Tile, typename Tile::QkTile, Tile::kHeadDim>(s, shared_.k[at_.kv.index], 0,
                                                              shared_.q[stage]);
    mbarrier_wait(&shared_.rows_full[stage], at_.ring.parity);
    wgmma_wait<0>();
    pin_registers(s);
    pin_registers(dv);
    prepare_scores<kSoftCap>(shared_, params_, flags, at_, 0, s);
    arrive_warp(&shared_.q_empty[stage]);
    probabilities<Element, kSoftCap>(s, p, weights, shared_.lse[stage], params_.exp_scale);
    send(kSoftCap ? weights : p);
    mbarrier_wait(&shared_.grad_o_full[stage], at_.ring.parity);
    if ((flags & kForeignRows) != 0) [[unlikely]] {
      clear_foreign_queries<Tile, typename Tile::VTile, Tile::kVBoxes>(
          shared_, at_, shared_.grad_o[stage], kOwnBarrier);
    }
    wgmma_fence();
    issue_key_gradient<Tile, typename Tile::VTile, Tile::kValueDim>(dv, p, shared_.grad_o[stage],
                                                                    !first);
    wgmma_wait<0>();
    pin_registers(dv);
    pin_registers(p);
    arrive_warp(&shared_.grad_o_empty[stage]);
  }

  /// The weights of dP, which a soft cap's slope sets apart from P.
  __device__ void send(const std::uint32_t (&weights)[kCount / 2]) {
    const int slot = at_.scores.index;
    mbarrier_wait(&shared_.p_empty[slot], at_.scores.parity ^ 1);
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i) {
      shared_.p[slot][i][threadIdx.x % 128] =
          make_uint4(weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3]);
    }
    arrive_warp(&shared_.p_full[slot]);
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  Place<Tile> at_;
};

template <typename Tile>
class BackwardKeyRole {
 public:
  __device__ BackwardKeyRole(const BackwardParams& params, SharedBackward<Tile>& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    KeyGradient<Tile::kHeadDim> dk;
    while (true) {
      mbarrier_wait(&shared_.q_full[at_.ring.index], at_.ring.parity);
      const int flags = broadcast(shared_.notes[at_.note].flags);
      if (flags & kNoMoreItems) break;
      block(flags, dk);
      at_.advance();
      if (flags & kLastOfItem)
        finish_keys(shared_, at_, params_.grad_k, dk, params_.scale, params_.overwrites_kv);
    }
    mbarrier_wait(&shared_.grad_s_empty[at_.scores.index], at_.scores.parity ^ 1);
    arrive_warp(&shared_.grad_s_full[at_.scores.index]);
  }

 private:
  using Element = typename Tile::Element;
  static constexpr int kCount = Tile::kQueries / 2;

  __device__ void block(int flags, KeyGradient<Tile::kHeadDim>& dk) {
    float dp[kCount];
    std::uint32_t weights[kCount / 2];
    std::uint32_t ds[kCount / 2];
    const bool first = (flags & kFirstOfItem) != 0;
    const int stage = at_.ring.index;
    if (first) mbarrier_wait(&shared_.v_full[at_.kv.index], at_.kv.parity);
    mbarrier_wait(&shared_.grad_o_full[stage], at_.ring.parity);
    wgmma_fence();
    issue_scores<Tile, typename Tile::VTile, Tile::kValueDim>(dp, shared_.v[at_.kv.index], 0,
                                                              shared_.grad_o[stage]);
    mbarrier_wait(&shared_.rows_full[stage], at_.ring.parity);
    receive(weights);
    wgmma_wait<0>();
    pin_registers(dp);
    pin_registers(dk);
    if ((flags & kPartlyMasked) != 0) [[unlikely]]
      clear_unweighted(weights, dp);
    scores_gradient<Element>(weights, dp, shared_.delta[stage], ds);
    arrive_warp(&shared_.grad_o_empty[stage]);
    mbarrier_wait(&shared_.grad_s_empty[at_.scores.index], at_.scores.parity ^ 1);
    store_gradient<Tile>(ds, shared_.grad_s[at_.scores.index], 0);
    fence_async_shared();
    arrive_warp(&shared_.grad_s_full[at_.scores.index]);
    if ((flags & kForeignRows) != 0) [[unlikely]] {
      clear_foreign_queries<Tile, typename Tile::QkTile, Tile::kQkBoxes>(
          shared_, at_, shared_.q[stage], kOwnBarrier + 1);
    }
    wgmma_fence();
    issue_key_gradient<Tile, typename Tile::QkTile, Tile::kHeadDim>(dk, ds, shared_.q[stage],
                                                                    !first);
    wgmma_wait<0>();
    pin_registers(dk);
    pin_registers(ds);
    arrive_warp(&shared_.q_empty[stage]);
  }

  __device__ void receive(std::uint32_t (&weights)[kCount / 2]) {
    const int slot = at_.scores.index;
    mbarrier_wait(&shared_.p_full[slot], at_.scores.parity);
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i) {
      const uint4 words = shared_.p[slot][i][threadIdx.x % 128];
      weights[4 * i] = words.x;
      weights[4 * i + 1] = words.y;
      weights[4 * i + 2] = words.z;
      weights[4 * i + 3] = words.w;
    }
    arrive_warp(&shared_.p_empty[slot]);
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  Place<Tile> at_;
};

}  // namespace annulus::kernels::sm90
