#pragma once

#include "kernels/sm90/backward_pair_tile.cuh"
#include "kernels/sm90/backward_turns.cuh"

/// The warpgroup of dQ: multiplies dS of all keys of the pair by half of K's columns, and has the
/// copy engine add the product to global memory. The partner takes the other half of the columns.
namespace annulus::kernels::sm90 {

template <typename Tile>
class PairQueries {
 public:
  __device__ PairQueries(const BackwardParams& params, SharedPair<Tile>& shared)
      : params_(params), shared_(shared), memory_(shared), rank_(uniform(cluster_rank())) {}

  __device__ void run() {
    while (true) {
      mbarrier_wait(memory_.here(offsetof(Shared, grad_s_full), slot_.index), slot_.parity);
      const int flags = memory_.flags(note_);
      if ((flags & kNoMoreItems) != 0) break;
      if ((flags & kFirstOfItem) != 0) clear_foreign_keys();
      block((flags & kLastOfItem) != 0);
    }
    bulk_wait<0>();
  }

 private:
  using Shared = SharedPair<Tile>;
  using QkTile = typename Tile::QkTile;
  using ScoreTile = typename Tile::ScoreTile;
  static constexpr int kCount = Tile::kQkHalf / 2;
  static constexpr int kBarrier = 3;

  __device__ void block(bool last) {
    float dq[kCount];
    const QueryNote& note = shared_.notes[note_];
    const int q = note.q_begin;
    const int head = note.head;
    const int batch = note.batch;
    const std::uint32_t turn = Tile::kOrdered ? shared_.turns[note_] : 0;
    const bool wanted = params_.grad_q.data != nullptr;
    wgmma_fence();
    multiply(
        dq, memory_.here(offsetof(Shared, grad_s), slot_.index, sizeof(Shared::grad_s[0])),
        memory_.here(offsetof(Shared, k)) + rank_ * static_cast<int>(sizeof(Shared::partner_k)),
        false);
    multiply(dq,
             memory_.here(offsetof(Shared, partner_grad_s), slot_.index, sizeof(Shared::grad_s[0])),
             memory_.here(offsetof(Shared, partner_k)), true);
    wgmma_commit();
    std::uint32_t* const counter = Tile::kOrdered ? turn_at(q, head, batch) : nullptr;
    const bool come = Tile::kOrdered && wanted && is_turn(counter, turn);
    wgmma_wait<0>();
    pin_registers(dq);
    memory_.arrive_both(offsetof(Shared, grad_s_empty), slot_.index);
    slot_.advance();
    if (++note_ == Tile::kNotes) note_ = 0;
    if (last) {
      arrive_warp(&shared_.kv_empty);
      kv_parity_ ^= 1;
    }
    if (!wanted) return;
    if constexpr (Tile::kOrdered) {
      pass_turn();
      await_turn(counter, turn, come);
    }
    reduce(dq, q, head, batch);
    if constexpr (Tile::kOrdered) {
      if (last) pass_turn();
    }
  }

  __device__ static void multiply(float (&dq)[kCount], std::uint32_t grad_s, std::uint32_t keys,
                                  bool accumulate) {
    const std::uint64_t a = ScoreTile::n_major(grad_s, 64);
    const std::uint64_t b = QkTile::n_major(keys, 64);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      WgmmaShape<typename Tile::Element, Tile::kQkHalf>::transposed(
          dq, advance(a, ScoreTile::n_major_step(step)), advance(b, QkTile::n_major_step(step)),
          accumulate || step != 0);
    }
  }

  /// A warp's sixteen rows leave in pieces of 32 columns. Rows outside the slice hold zeros.
  __device__ void reduce(const float (&dq)[kCount], int q, int head, int batch) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int warp = static_cast<int>(threadIdx.x % 128 / 32);
#pragma unroll
    for (int piece = 0; piece < Tile::kQkHalf / 32; ++piece) {
      float* staged = shared_.grad_q[warp][piece_];
      if (lane == 0) bulk_wait_read<Tile::kPieces - 1>();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8; i += 4) stage(&dq[piece * 16 + i], i / 2, staged);
      fence_async_shared();
      __syncwarp();
      if (lane == 0) {
        tma_reduce_add(&params_.grad_q_map, staged, rank_ * Tile::kQkHalf + piece * 32,
                       q + warp * 16, head, batch);
        bulk_commit();
      }
      if (++piece_ == Tile::kPieces) piece_ = 0;
    }
  }

  /// Columns `chunk` · 4 to + 8 of a piece, and those sixteen further on, in the copy engine's
  /// swizzled order. Odd rows store these first: the sixteen lanes that store at a time then meet
  /// no bank twice.
  __device__ void stage(const float* values, int chunk, float* staged) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int row = lane / 4;  // and eight further on, where the pattern is the same
    const bool odd = row % 2 != 0;
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      float* to = staged + row * 32 + lane % 2 * 2 +
                  ((chunk + lane % 4 / 2) ^ (row ^ (odd != (turn == 1) ? 4 : 0))) * 4;
      float chosen[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        chosen[i] = (odd != (turn == 1) ? values[8 + i] : values[i]) * params_.scale;
      }
      *reinterpret_cast<float2*>(to) = make_float2(chosen[0], chosen[1]);
      *reinterpret_cast<float2*>(to + 8 * 32) = make_float2(chosen[2], chosen[3]);
    }
  }

  /// The counter of this warp's sixteen rows and this block's columns.
  __device__ std::uint32_t* turn_at(int q, int head, int batch) const {
    const std::int64_t index = std::int64_t{batch} * params_.q_heads + head;
    return params_.turns + index * params_.turn_rows +
           (q / 16 + static_cast<int>(threadIdx.x % 128 / 32)) * 2 + rank_;
  }

  /// For the lane that adds; looked at beside the product first.
  __device__ static bool is_turn(const std::uint32_t* counter, std::uint32_t turn) {
    return threadIdx.x % 32 != 0 || current_turn(counter) == turn;
  }

  __device__ void await_turn(std::uint32_t* counter, std::uint32_t turn, bool come) {
    passed_ = counter;
    next_turn_ = turn + 1;
    while (!come) come = is_turn(counter, turn);
    if (threadIdx.x % 32 == 0) fence_async_global();
    __syncwarp();
  }

  /// That of the last block, beside the next one's product where there is one. Only once the
  /// additions are complete; that the copy engine has read their source is not enough. To have seen
  /// the completion orders them before the store (PTX ISA, async proxy).
  __device__ void pass_turn() {
    if (passed_ != nullptr && threadIdx.x % 32 == 0) {
      bulk_wait<0>();
      store_turn(passed_, next_turn_);
    }
    passed_ = nullptr;
  }

  /// Keys behind the pair's last belong to others and may be NaN; their dS is 0.
  __device__ void clear_foreign_keys() {
    mbarrier_wait(&shared_.k_full, kv_parity_);
    const KeyItem item = broadcast(shared_.item);
    const int partner_begin = item.k_begin + (1 - 2 * rank_) * Tile::kKeys;
    if (max(item.k_begin, partner_begin) + Tile::kKeys <= item.k_end) return;
    constexpr int kBoxes = Tile::kQkHalf / QkTile::kColumns;
    clear_foreign_rows<QkTile, Tile::kKeys, kBoxes>(shared_.k + rank_ * Tile::kQkHalf * 64, 0,
                                                    item.k_end - item.k_begin);
    clear_foreign_rows<QkTile, Tile::kKeys, kBoxes>(shared_.partner_k, 0,
                                                    item.k_end - partner_begin);
    fence_async_shared();
    named_barrier_sync(kBarrier, 128);
  }

  const BackwardParams& params_;
  SharedPair<Tile>& shared_;
  const PairMemory<Tile> memory_;
  const int rank_;
  Ring<Tile::kSlots> slot_;
  std::uint32_t kv_parity_ = 0;
  int note_ = 0;
  int piece_ = 0;
  std::uint32_t* passed_ = nullptr;  // in order: the counter of the last block
  std::uint32_t next_turn_ = 0;
};

}  // namespace annulus::kernels::sm90
