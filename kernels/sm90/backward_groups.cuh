#pragma once

#include "kernels/sm90/backward_products.cuh"
#include "kernels/sm90/tma.cuh"

/// One of two or three warpgroups that each keep dK and dV of 64 keys, compute all products for
/// them and share dQ: dSᵀ comes out of the tensor cores as the A operand of dK, and goes to
/// shared memory for dQᵀ = Kᵀ·dSᵀ over the keys of all. Of three (head_dim 64) one takes it all,
/// the next one that of the next block of queries. Of two (128) each takes 64 columns of it, one
/// block late, so that neither waits for the other's dS, and they take turns at S: one's
/// exponentials and dS then pass under the other's products.
namespace annulus::kernels::sm90 {

inline constexpr int kGroupBarrier = 1;   // one a warpgroup
inline constexpr int kScoresBarrier = 4;  // one a warpgroup: its turn at S

template <typename Tile, bool kSoftCap>
class BackwardGroup {
 public:
  __device__ BackwardGroup(const BackwardParams& params, SharedBackward<Tile>& shared, int group)
      : params_(params),
        shared_(shared),
        group_(group),
        base_(static_cast<std::uint32_t>(uniform(static_cast<int>(shared_address(&shared))))),
        column_bytes_(threadIdx.x % 4 * 8),
        row_bytes_(gradient_row_bytes()),
        drain_bytes_(drain_bytes()) {
    // Kept, where the compiler would rather compute them anew for each tile.
    asm volatile("" : "+r"(column_bytes_), "+r"(row_bytes_), "+r"(drain_bytes_));
  }

  __device__ void run() {
    KeyGradient<Tile::kHeadDim> dk;
    KeyGradient<Tile::kValueDim> dv;
    int flags = uniform(await_queries(at_));
    if (group_ == 1) pass_scores_turn();
    while ((flags & kNoMoreItems) == 0) {
      mbarrier_wait(&shared_.k_full[at_.kv.index], at_.kv.parity);
      clear_foreign_keys();
      hold_keys();
      mbarrier_wait(&shared_.v_full[at_.kv.index], at_.kv.parity);
      bool accumulate = false;
      while (true) {
        if ((flags & kPartlyMasked) != 0) [[unlikely]] {
          block<true>(flags, accumulate, dk, dv);
        } else {
          block<false>(flags, accumulate, dk, dv);
        }
        if ((flags & kLastOfItem) != 0) break;
        accumulate = true;
        flags = uniform(Tile::kTurns ? await_queries(at_) : next_flags_);
      }
      if constexpr (!Tile::kTurns) finish_query_gradient();
      finish_item(dk, dv);
      flags = uniform(await_queries(at_));
    }
    if (group_ == 0) await_scores_turn();
    // The end travels on to the draining warp as a note without dQ.
    if (!Tile::kTurns || turn_ == group_) {
      take_drain();
      give_drain();
    }
  }

 private:
  using Element = typename Tile::Element;
  using QkTile = typename Tile::QkTile;
  using VTile = typename Tile::VTile;
  static constexpr int kCount = Tile::kQueries / 2;

  // Addresses in shared memory, of what the rings point to.
  using Shared = SharedBackward<Tile>;
  __device__ std::uint32_t keys() const {
    return base_ + offsetof(Shared, k) + at_.kv.index * sizeof(Shared::k[0]);
  }
  __device__ std::uint32_t values() const {
    return base_ + offsetof(Shared, v) + at_.kv.index * sizeof(Shared::v[0]);
  }
  __device__ std::uint32_t queries() const {
    return base_ + offsetof(Shared, q) + at_.ring.index * sizeof(Shared::q[0]);
  }
  __device__ std::uint32_t grad_o() const {
    return base_ + offsetof(Shared, grad_o) + at_.ring.index * sizeof(Shared::grad_o[0]);
  }
  __device__ std::uint32_t grad_s(int slot) const {
    return base_ + offsetof(Shared, grad_s) + slot * sizeof(Shared::grad_s[0]);
  }

  __device__ std::uint32_t barrier(std::size_t first, int index) const {
    return base_ + static_cast<std::uint32_t>(first) + static_cast<std::uint32_t>(index) * 8;
  }

  /// A block's flags, once its Q is there. One lane reads, the one that later tells the producer
  /// that the warp is done with the note; the others get 0.
  __device__ int await_queries(const Place<Tile>& at) const {
    mbarrier_wait(barrier(offsetof(Shared, q_full), at.ring.index), at.ring.parity);
    const std::uint32_t flags =
        base_ + offsetof(Shared, notes) + at.note * sizeof(QueryNote) + offsetof(QueryNote, flags);
    return threadIdx.x % 32 == 0 ? load_shared_word(flags) : 0;
  }

  /// The next block's flags, while dK is under way. What is in flight must not depend on a branch:
  /// an item's last block looks at itself.
  __device__ void look_ahead(bool last_of_item) {
    Place<Tile> next = at_;
    if (!last_of_item) next.advance();
    next_flags_ = await_queries(next);
  }

  /// Halves: one warpgroup's S at a time.
  __device__ void await_scores_turn() const {
    if constexpr (!Tile::kTurns) named_barrier_sync(kScoresBarrier + group_, 256);
  }
  __device__ void pass_scores_turn() const {
    if constexpr (!Tile::kTurns) named_barrier_arrive(kScoresBarrier + 1 - group_, 256);
  }

  template <bool kMasked>
  __device__ void block(int flags, bool accumulate, KeyGradient<Tile::kHeadDim>& dk,
                        KeyGradient<Tile::kValueDim>& dv) {
    float s[kCount];
    float dp[kCount];
    std::uint32_t p[kCount / 2];
    std::uint32_t ds[kCount / 2];
    if constexpr (kMasked) {
      if ((flags & kForeignRows) != 0) {
        clear_foreign_queries(shared_, at_, kGroupBarrier + group_);
      }
    }
    if constexpr (!kMasked) start_from_delta(dp);
    await_scores_turn();
    wgmma_fence();
    start_scores(s);
    float2 lse[kCount / 4];
    if constexpr (!kMasked) load_statistics(lse, offsetof(Shared, lse));
    // What is in flight must not depend on a branch: masks come first.
    if constexpr (kMasked) {
      wgmma_wait<0>();
      pin_registers(s);
      pass_scores_turn();
      prepare_scores<kSoftCap>(shared_, params_, flags, at_, group_ * 64, s);
      start_from_delta(dp);
    }
    wgmma_fence();
    issue_scores<Tile, VTile, Tile::kValueDim>(
        dp, VTile::k_major(values() + group_ * 64 * VTile::kColumns * 2), VTile::k_major(grad_o()),
        true);
    if constexpr (kMasked) load_statistics(lse, offsetof(Shared, lse));
    exponentials<kMasked>(s, p, lse);
    const int slot = at_.scores.index;
    // Of two warpgroups before dP is waited for: else the assembler sinks the exponentials there.
    if constexpr (!Tile::kTurns) {
      await_slot(slot);
      pin_registers(s);
    }
    gradient<kMasked>(s, dp, p, ds);
    if constexpr (Tile::kTurns) await_slot(slot);
    store_gradient_rows(ds, grad_s(slot) + group_ * Tile::kQueries * 128 + row_bytes_);
    wgmma_fence();
    issue_key_gradient<Tile, VTile, Tile::kValueDim>(dv, p, grad_o(), accumulate);
    fence_async_shared();
    arrive_warp(barrier(offsetof(Shared, grad_s_full), slot));
    if constexpr (Tile::kTurns) {
      finish_in_turn(accumulate, p, ds, dk, dv);
    } else {
      finish_half(accumulate, (flags & kLastOfItem) != 0, p, ds, dk, dv);
    }
    at_.advance();
  }

  __device__ void await_slot(int slot) const {
    mbarrier_wait(barrier(offsetof(Shared, grad_s_empty), slot), at_.scores.parity ^ 1);
  }

  /// A half of the last block's dQ, and dK under its way out. dV is under way. What is in flight
  /// must not depend on a branch: an item's first block multiplies too, but has nothing to stage.
  __device__ void finish_half(bool accumulate, bool last_of_item, std::uint32_t (&p)[kCount / 2],
                              std::uint32_t (&ds)[kCount / 2], KeyGradient<Tile::kHeadDim>& dk,
                              KeyGradient<Tile::kValueDim>& dv) {
    float dq[kCount];
    const Ring<Tile::kScoreStages> last = last_scores();
    mbarrier_wait(barrier(offsetof(Shared, grad_s_full), last.index), last.parity);
    issue_drained(dq, last.index);
    release_grad_o(p, dv);
    issue_key_gradient<Tile, QkTile, Tile::kHeadDim>(dk, ds, queries(), accumulate);
    if (accumulate) take_drain();
    wgmma_wait<1>();
    pin_registers(dq);
    if (accumulate) send_drained(dq, last.index);
    look_ahead(last_of_item);
    release_queries(ds, dk);
  }

  /// A half of dQ of an item's last block.
  __device__ void finish_query_gradient() {
    float dq[kCount];
    const Ring<Tile::kScoreStages> last = last_scores();
    mbarrier_wait(barrier(offsetof(Shared, grad_s_full), last.index), last.parity);
    issue_drained(dq, last.index);
    take_drain();
    wgmma_wait<0>();
    pin_registers(dq);
    send_drained(dq, last.index);
  }

  /// The slot of the block before, whose phase has the parity of its own turn.
  __device__ Ring<Tile::kScoreStages> last_scores() const {
    Ring<Tile::kScoreStages> ring = at_.scores;
    if (--ring.index < 0) {
      ring.index = Tile::kScoreStages - 1;
      ring.parity ^= 1;
    }
    return ring;
  }

  /// dQ, multiplied from a slot of dS, on its way.
  __device__ void send_drained(const float (&dq)[kCount], int slot) {
    arrive_warp(barrier(offsetof(Shared, grad_s_empty), slot));
    stage_drained(dq);
    give_drain();
  }

  /// dK, and dQ where the block of queries is this warpgroup's. dV is under way.
  __device__ void finish_in_turn(bool accumulate, std::uint32_t (&p)[kCount / 2],
                                 std::uint32_t (&ds)[kCount / 2], KeyGradient<Tile::kHeadDim>& dk,
                                 KeyGradient<Tile::kValueDim>& dv) {
    wgmma_fence();
    issue_key_gradient<Tile, QkTile, Tile::kHeadDim>(dk, ds, queries(), accumulate);
    release_grad_o(p, dv);
    release_queries(ds, dk);
    if (turn_ == group_) {
      float dq[kCount];
      const int slot = at_.scores.index;
      mbarrier_wait(barrier(offsetof(Shared, grad_s_full), slot), at_.scores.parity);
      issue_drained(dq, slot);
      take_drain();
      wgmma_wait<0>();
      pin_registers(dq);
      send_drained(dq, slot);
    }
    if (++turn_ == Tile::kGroups) turn_ = 0;
  }

  /// Once dV is there, the last product but one: dO, and the rows of LSE and δ.
  __device__ void release_grad_o(std::uint32_t (&p)[kCount / 2], KeyGradient<Tile::kValueDim>& dv) {
    wgmma_wait<1>();
    pin_registers(dv.values);
    pin_registers(p);
    arrive_warp(barrier(offsetof(Shared, grad_o_empty), at_.ring.index));
  }

  /// Once dK is there, the last product.
  __device__ void release_queries(std::uint32_t (&ds)[kCount / 2],
                                  KeyGradient<Tile::kHeadDim>& dk) {
    wgmma_wait<0>();
    pin_registers(dk.values);
    pin_registers(ds);
    arrive_warp(barrier(offsetof(Shared, q_empty), at_.ring.index));
  }

  /// K's first 16 columns, from registers, leave shared memory to others while S is multiplied.
  /// There is no room for more.
  __device__ void hold_keys() {
    if constexpr (Tile::kHoldsKeys) {
      const std::uint32_t lane = threadIdx.x % 32;
      const std::uint32_t key = group_ * 64 + threadIdx.x % 128 / 32 * 16 + lane % 16;
      load_matrices(keys() + key * 128 + (lane / 16 ^ key % 8) * 16, held_);
      pin_registers(held_);
    }
  }

  __device__ void start_scores(float (&s)[kCount]) const {
    using Shape = WgmmaShape<Element, Tile::kQueries>;
    const std::uint64_t a = QkTile::k_major(keys() + group_ * 64 * QkTile::kColumns * 2);
    const std::uint64_t b = QkTile::k_major(queries());
    if constexpr (Tile::kHoldsKeys) Shape::registers_k_major(s, held_, b, false);
#pragma unroll
    for (int step = Tile::kHoldsKeys ? 1 : 0; step < Tile::kHeadDim / 16; ++step) {
      Shape::shared(s, advance(a, QkTile::k_major_step(step, Tile::kKeys)),
                    advance(b, QkTile::k_major_step(step, Tile::kQueries)), step != 0);
    }
    wgmma_commit();
  }

  /// S to P in fp32, in place; with a soft cap to P times its slope, and P itself to `p`.
  template <bool kMasked>
  __device__ void exponentials(float (&s)[kCount], std::uint32_t (&p)[kCount / 2],
                               const float2 (&lse)[kCount / 4]) {
    if constexpr (!kMasked) {
      wgmma_wait<1>();
      pin_registers(s);
      pass_scores_turn();
      if constexpr (kSoftCap) cap_scores(s, params_.score_scale);
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float2 lse_of = lse[i / 4];
      const float low = exp2_approx(fmaf(s[i], params_.exp_scale, -lse_of.x));
      const float high = exp2_approx(fmaf(s[i + 1], params_.exp_scale, -lse_of.y));
      if constexpr (kSoftCap) {
        p[i / 2] = pack_pair<Element>(low, high);
        s[i] = low == 0.0F ? 0.0F : low * (1.0F - s[i] * s[i]);
        s[i + 1] = high == 0.0F ? 0.0F : high * (1.0F - s[i + 1] * s[i + 1]);
      } else {
        s[i] = low;
        s[i + 1] = high;
      }
    }
    pin_registers(s);  // under dP's product, not after it
  }

  /// This thread's queries among LSE or δ.
  __device__ void load_statistics(float2 (&values)[kCount / 4], std::size_t array) const {
    const std::uint32_t first = base_ + static_cast<std::uint32_t>(array) +
                                at_.ring.index * Tile::kQueries * 4 + column_bytes_;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) values[i] = load_shared_pair(first + i * 32);
  }

  /// dP is added to −δ, which dS then need not subtract, nor wait for.
  __device__ void start_from_delta(float (&dp)[kCount]) const {
    float2 offset[kCount / 4];
    load_statistics(offset, offsetof(Shared, delta));
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      dp[i] = dp[i + 2] = offset[i / 4].x;
      dp[i + 1] = dp[i + 3] = offset[i / 4].y;
    }
    pin_registers(dp);
  }

  /// dS = weight·(dP − δ), and P as dV's product takes it.
  template <bool kMasked>
  __device__ void gradient(const float (&weights)[kCount], float (&dp)[kCount],
                           std::uint32_t (&p)[kCount / 2], std::uint32_t (&ds)[kCount / 2]) {
    wgmma_wait<0>();
    pin_registers(dp);
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      if constexpr (kMasked) {  // dP of a masked pair may be NaN, which a weight of 0 lets through
        if (weights[i] == 0.0F) dp[i] = 0.0F;
        if (weights[i + 1] == 0.0F) dp[i + 1] = 0.0F;
      }
      const float low = weights[i] * dp[i];
      const float high = weights[i + 1] * dp[i + 1];
      if constexpr (!kSoftCap) p[i / 2] = pack_pair<Element>(weights[i], weights[i + 1]);
      ds[i / 2] = pack_pair<Element>(low, high);
    }
  }

  /// This warpgroup's 64 columns of dQᵀ, from a slot of dS.
  __device__ void issue_drained(float (&dq)[kCount], int slot) {
    using Scores = typename Tile::ScoreTile;
    const std::uint64_t a =
        QkTile::n_major(keys() + (Tile::kTurns ? 0 : group_ * 64 * Tile::kKeys * 2), Tile::kKeys);
    const std::uint64_t b = Scores::k_major(grad_s(slot));
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step) {
      WgmmaShape<Element, Tile::kQueries>::transposed_k_major(
          dq, advance(a, QkTile::n_major_step(step)),
          advance(b, Scores::k_major_step(step, Tile::kQueries)), step != 0);
    }
    wgmma_commit();
  }

  __device__ void take_drain() {
    mbarrier_wait(barrier(offsetof(Shared, grad_q_empty), group_), drain_parity_ ^ 1);
    drain_parity_ ^= 1;
  }

  __device__ void give_drain() {
    fence_async_shared();
    arrive_warp(barrier(offsetof(Shared, grad_q_full), group_));
  }

  /// To [query][32 columns] boxes in the copy engine's swizzled order, without bank conflicts: a
  /// thread holds columns lane/4 and lane/4 + 8 of its warp's sixteen, queries as S's fragments.
  __device__ void stage_drained(const float (&dq)[kCount]) const {
    const std::uint32_t place =
        base_ + offsetof(Shared, grad_q) + group_ * sizeof(Shared::grad_q[0]) + drain_bytes_;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // column lane/4 + i / 2 * 8, query lane % 4 * 2 + i % 2
      const std::uint32_t to = (place ^ (i / 2 * 32 + i % 2 * 16)) + i % 2 * 128;
#pragma unroll
      for (int j = i; j < kCount; j += 4) {
        store_shared(to + j / 4 * 8 * 128, dq[j] * drain_scale());
      }
    }
  }

  /// Of the first of this thread's elements: its chunk of four columns trades places by the query.
  __device__ static std::uint32_t drain_bytes() {
    const std::uint32_t lane = threadIdx.x % 32;
    const std::uint32_t warp = threadIdx.x % 128 / 32;
    const std::uint32_t query = lane % 4 * 2;
    const std::uint32_t chunk = warp % 2 * 4 + lane / 16;
    return warp / 2 * (Tile::kPieceRows * 128) + query * 128 + (chunk ^ query) * 16 +
           lane / 4 % 4 * 4;
  }

  __device__ float drain_scale() const { return Tile::kScaledGradient ? 1.0F : params_.scale; }

  /// Keys behind the block's last belong to others and may be NaN; their dS is 0. Other
  /// warpgroups read these rows only for dQ, which waits for this one's dS.
  __device__ void clear_foreign_keys() {
    const KeyItem item = broadcast(shared_.items[at_.kv.index]);
    const int keys = item.k_end - item.k_begin - group_ * 64;
    if (keys >= 64) return;
    constexpr int kChunks = QkTile::kColumns * 2 / 16;
    for (int i = static_cast<int>(threadIdx.x % 128); i < Tile::kQkBoxes * 64 * kChunks; i += 128) {
      const int row = i / kChunks % 64;
      const int box = i / kChunks / 64;
      if (row < keys) continue;
      reinterpret_cast<uint4*>(shared_.k[at_.kv.index] + (box * Tile::kKeys + group_ * 64 + row) *
                                                             QkTile::kColumns)[i % kChunks] =
          make_uint4(0, 0, 0, 0);
    }
    fence_async_shared();
    named_barrier_sync(kGroupBarrier + group_, 128);
  }

  __device__ void finish_item(const KeyGradient<Tile::kHeadDim>& dk,
                              const KeyGradient<Tile::kValueDim>& dv) {
    const KeyItem item = broadcast(shared_.items[at_.kv.index]);
    arrive_warp(&shared_.kv_empty[at_.kv.index]);
    at_.kv.advance();
    take_drain();
    const float value_scale = Tile::kScaledGradient ? 1.0F / params_.scale : 1.0F;
    finish(dv, params_.grad_v, &params_.grad_v_map, value_scale, item);
    finish(dk, params_.grad_k, &params_.grad_k_map, drain_scale(), item);
    // The place of dQ goes back as if the draining warp had emptied it.
    if (threadIdx.x % 128 == 0) {
      bulk_wait_read<0>();
      mbarrier_arrive(&shared_.grad_q_empty[group_]);
    }
  }

  /// Adds or writes 64 keys of dK or dV, 32 columns at a time through the place of dQ. What is
  /// written counts in whole boxes: none may reach into the next block.
  template <int kDim>
  __device__ void finish(const KeyGradient<kDim>& d, const GradientRows& rows,
                         const CUtensorMap* map, float scale, const KeyItem& item) {
    if (rows.data == nullptr) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int key = static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane / 4;
#pragma unroll
    for (int piece = 0; piece < kDim / 32; ++piece) {
      float* staged = shared_.grad_q[group_][0] + piece % 2 * 64 * 32;
      if (threadIdx.x % 128 == 0) bulk_wait_read<1>();
      named_barrier_sync(kGroupBarrier + group_, 128);
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        // Rows eight apart share their place in the pattern.
        float* to = staged + key * 32 + (((i / 2 + lane % 4 / 2) ^ (key % 8)) * 4 + lane % 2 * 2);
        const float* values = d.values + piece * 16 + i;
        *reinterpret_cast<float2*>(to) = make_float2(values[0] * scale, values[1] * scale);
        *reinterpret_cast<float2*>(to + 8 * 32) = make_float2(values[2] * scale, values[3] * scale);
      }
      fence_async_shared();
      named_barrier_sync(kGroupBarrier + group_, 128);
      if (threadIdx.x % 128 == 0) {
        const int row = item.k_begin + group_ * 64;
        if (item.overwrites_kv == 0) {
          tma_reduce_add(map, staged, piece * 32, row, item.kv_head, item.batch);
        } else if (row < item.k_end) {
          tma_store(map, staged, piece * 32, row, item.kv_head, item.batch);
        }
        bulk_commit();
      }
    }
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  const int group_;
  const std::uint32_t base_;    // of `shared`; what lies there is best addressed from it
  std::uint32_t column_bytes_;  // of this thread's first query among fp32 statistics
  std::uint32_t row_bytes_;     // of its first row in a box of dS
  std::uint32_t drain_bytes_;   // of its first element in a box of dQ
  std::uint32_t drain_parity_ = 0;
  int next_flags_ = 0;
  int turn_ = 0;  // the warpgroup that takes dQ of the block of queries
  Place<Tile> at_;
  std::uint32_t held_[4];  // of K, as an operand of S
};

}  // namespace annulus::kernels::sm90
