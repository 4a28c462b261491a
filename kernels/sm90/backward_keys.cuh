#pragma once

#include "kernels/sm90/backward_products.cuh"

/// One of two warpgroups that each keep dK and dV of 64 keys: Sᵀ and dPᵀ come out of the tensor
/// cores transposed, so that P and dS already are the A operands of dV and dK.
namespace annulus::kernels::sm90 {

inline constexpr int kOwnBarrier = 1;  // one named barrier a warpgroup

template <typename Tile, bool kSoftCap>
class BackwardKeys {
 public:
  __device__ BackwardKeys(const BackwardParams& params, SharedBackward<Tile>& shared, int warpgroup)
      : params_(params), shared_(shared), warpgroup_(warpgroup), first_key_(warpgroup * 64) {}

  __device__ void run() {
    float s[Tile::kQueries / 2];
    KeyGradient<Tile::kHeadDim> dk;
    KeyGradient<Tile::kValueDim> dv;
    int flags = await_queries();
    while ((flags & kNoMoreItems) == 0) {
      mbarrier_wait(&shared_.k_full[at_.kv.index], at_.kv.parity);
      wgmma_fence();
      start_scores(s, shared_.q[at_.ring.index]);
      mbarrier_wait(&shared_.v_full[at_.kv.index], at_.kv.parity);
      bool first = true;
      bool last = false;
      while (!last) {
        last = (flags & kLastOfItem) != 0;
        flags = block(flags, first, s, dk, dv);
        first = false;
      }
      wgmma_wait<0>();
      pin_registers(s);
      finish_item(dk, dv);
      flags = await_queries();
    }
    // The end travels on to the warpgroup of dQ as a note without scores.
    mbarrier_wait(&shared_.grad_s_empty[at_.scores.index], at_.scores.parity ^ 1);
    arrive_warp(&shared_.grad_s_full[at_.scores.index]);
  }

 private:
  using Element = typename Tile::Element;
  using QkTile = typename Tile::QkTile;
  using VTile = typename Tile::VTile;

  /// Flags of the block whose turn it is, once its Q is there.
  __device__ int await_queries() {
    mbarrier_wait(&shared_.q_full[at_.ring.index], at_.ring.parity);
    return broadcast(shared_.notes[at_.note].flags);
  }

  __device__ void start_scores(float (&s)[Tile::kQueries / 2], const Element* queries) {
    issue_scores<Tile, QkTile, Tile::kHeadDim>(s, shared_.k[at_.kv.index], first_key_, queries);
  }

  /// From a block's scores on their way to the next block's, whose flags are returned.
  __device__ int block(int flags, bool first, float (&s)[Tile::kQueries / 2],
                       KeyGradient<Tile::kHeadDim>& dk, KeyGradient<Tile::kValueDim>& dv) {
    float dp[Tile::kQueries / 2];
    std::uint32_t p[Tile::kQueries / 4];
    std::uint32_t weights[Tile::kQueries / 4];
    std::uint32_t ds[Tile::kQueries / 4];
    const int stage = at_.ring.index;

    mbarrier_wait(&shared_.rows_full[stage], at_.ring.parity);
    wgmma_wait<0>();
    pin_registers(s);
    prepare_scores<kSoftCap>(shared_, params_, flags, at_, first_key_, s);
    probabilities<Element, kSoftCap>(s, p, weights, shared_.lse[stage], params_.exp_scale);

    // dP only now: beside S, dK and dV there are no registers for it.
    mbarrier_wait(&shared_.grad_o_full[stage], at_.ring.parity);
    if ((flags & kForeignRows) != 0) [[unlikely]]
      clear_foreign_queries(shared_, at_, kOwnBarrier + warpgroup_);
    wgmma_fence();
    issue_scores<Tile, VTile, Tile::kValueDim>(dp, shared_.v[at_.kv.index], first_key_,
                                               shared_.grad_o[stage]);
    issue_key_gradient<Tile, VTile, Tile::kValueDim>(dv, p, shared_.grad_o[stage], !first);
    wgmma_wait<1>();
    pin_registers(dp);
    if ((flags & kPartlyMasked) != 0) [[unlikely]]
      clear_unweighted(kSoftCap ? weights : p, dp);
    scores_gradient<Element>(kSoftCap ? weights : p, dp, shared_.delta[stage], ds);
    mbarrier_wait(&shared_.grad_s_empty[at_.scores.index], at_.scores.parity ^ 1);
    store_gradient<Tile>(ds, shared_.grad_s[at_.scores.index], first_key_);
    fence_async_shared();
    arrive_warp(&shared_.grad_s_full[at_.scores.index]);
    wgmma_fence();
    issue_key_gradient<Tile, QkTile, Tile::kHeadDim>(dk, ds, shared_.q[stage], !first);
    wgmma_wait<1>();
    pin_registers(dv.values);
    pin_registers(p);
    arrive_warp(&shared_.grad_o_empty[stage]);
    at_.advance();
    wgmma_wait<0>();
    pin_registers(dk.values);
    pin_registers(ds);
    arrive_warp(&shared_.q_empty[stage]);
    // In-flight registers must not depend on a branch: after the last block of queries K stands in
    // for the next one, and nobody looks at the product.
    const bool last = (flags & kLastOfItem) != 0;
    const int next = last ? 0 : await_queries();
    wgmma_fence();
    start_scores(s, last ? shared_.k[at_.kv.index] : shared_.q[at_.ring.index]);
    return next;
  }

  __device__ void finish_item(const KeyGradient<Tile::kHeadDim>& dk,
                              const KeyGradient<Tile::kValueDim>& dv) {
    const KeyItem item = broadcast(shared_.items[at_.kv.index]);
    arrive_warp(&shared_.kv_empty[at_.kv.index]);
    at_.kv.advance();
    const int key = item.k_begin + first_key_ + traded_row();
    const bool valid = key < item.k_end;
    const bool overwrites = item.overwrites_kv != 0;
    if (params_.grad_k.data != nullptr) {
      add_rows(dk.values, params_.scale,
               gradient_row(params_.grad_k, item.batch, key, item.kv_head), valid, overwrites);
    }
    if (params_.grad_v.data != nullptr) {
      add_rows(dv.values, 1.0F, gradient_row(params_.grad_v, item.batch, key, item.kv_head), valid,
               overwrites);
    }
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  const int warpgroup_;
  const int first_key_;
  Place<Tile> at_;
};

}  // namespace annulus::kernels::sm90
