#pragma once

#include "kernels/sm90/backward_products.cuh"
#include "kernels/sm90/backward_turns.cuh"
#include "kernels/sm90/tma.cuh"

/// The warpgroup of dQ: multiplies dS by K as others finish dS, and has the copy engine add the
/// product to global memory. Its work fills the tensor cores while they compute P and dS.
namespace annulus::kernels::sm90 {

template <typename Tile>
class BackwardQueries {
 public:
  __device__ BackwardQueries(const BackwardParams& params, SharedBackward<Tile>& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    while (true) {
      mbarrier_wait(&shared_.grad_s_full[score_ring_.index], score_ring_.parity);
      const QueryNote note = broadcast(shared_.notes[note_]);
      if (note.flags & kNoMoreItems) break;
      if (note.flags & kFirstOfItem) clear_foreign_keys();
      block(note);
      score_ring_.advance();
      if (++note_ == Tile::kNotes) note_ = 0;
      if (note.flags & kLastOfItem) {
        arrive_warp(&shared_.kv_empty[kv_ring_.index]);
        kv_ring_.advance();
      }
    }
    bulk_wait<0>();
  }

 private:
  // Columns of dQ at a time: all that the registers hold.
  static constexpr int kColumns = Tile::kHeadDim % 64 == 0 ? 64 : 96;
  static constexpr int kParts = Tile::kHeadDim / kColumns;
  static constexpr int kBarrier = 3;

  __device__ void block(const QueryNote& note) {
    // Read before the stage is released, after which the note may change.
    const std::uint32_t turn = Tile::kOrdered ? broadcast(shared_.turns[note_]) : 0;
#pragma unroll 1
    for (int rows = 0; rows < Tile::kQueries; rows += 64) {
      const int q = note.q_begin + rows;
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        float dq[kColumns / 2];
        wgmma_fence();
        issue_query_gradient<Tile, kColumns>(
            dq, shared_.grad_s[score_ring_.index] + rows * Tile::kKeys,
            shared_.k[kv_ring_.index] + part * kColumns * Tile::kKeys);
        wgmma_wait<0>();
        pin_registers(dq);
        if (rows + 64 == Tile::kQueries && part + 1 == kParts) {
          arrive_warp(&shared_.grad_s_empty[score_ring_.index]);
        }
        if (params_.grad_q.data == nullptr) continue;
        if constexpr (Tile::kOrdered) {
          if (part == 0) await_turn(note, q, turn);
        }
        reduce(dq, note, q, part * kColumns);
      }
      if constexpr (Tile::kOrdered) {
        if (params_.grad_q.data != nullptr) pass_turn(note, q, turn);
      }
    }
  }

  /// The counter of this warp's sixteen rows.
  __device__ std::uint32_t* turn_at(const QueryNote& note, int q) const {
    const std::int64_t head = std::int64_t{note.batch} * params_.q_heads + note.head;
    return params_.turns + head * params_.turn_rows + q / 16 + threadIdx.x % 128 / 32;
  }

  __device__ void await_turn(const QueryNote& note, int q, std::uint32_t turn) const {
    if (threadIdx.x % 32 == 0) await_turn_at(turn_at(note, q), turn);
    __syncwarp();
  }

  /// Only once the additions are complete; that the copy engine has read its source is not enough.
  __device__ void pass_turn(const QueryNote& note, int q, std::uint32_t turn) const {
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    bulk_wait<0>();
    fence_async_global();
    store_turn(turn_at(note, q), turn + 1U);
  }

  /// A warp's sixteen rows leave in pieces of 32 columns, in the copy engine's swizzled order. Rows
  /// outside the slice hold zeros.
  __device__ void reduce(const float (&dq)[kColumns / 2], const QueryNote& note, int q,
                         int column) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int warp = static_cast<int>(threadIdx.x % 128 / 32);
    const int row = lane / 4;
#pragma unroll
    for (int piece = 0; piece < kColumns / 32; ++piece) {
      float* staged = shared_.grad_q[warp][piece_];
      if (lane == 0) bulk_wait_read<Tile::kPieces - 1>();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        // Rows eight apart share their place in the pattern.
        float* to = staged + row * 32 + (((i / 2 + lane % 4 / 2) ^ row) * 4 + lane % 2 * 2);
        const float* values = dq + piece * 16 + i;
        *reinterpret_cast<float2*>(to) =
            make_float2(values[0] * params_.scale, values[1] * params_.scale);
        *reinterpret_cast<float2*>(to + 8 * 32) =
            make_float2(values[2] * params_.scale, values[3] * params_.scale);
      }
      fence_async_shared();
      __syncwarp();
      if (lane == 0) {
        tma_reduce_add(&params_.grad_q_map, staged, column + piece * 32, q + warp * 16, note.head,
                       note.batch);
        bulk_commit();
      }
      if (++piece_ == Tile::kPieces) piece_ = 0;
    }
  }

  /// Keys behind the block's last belong to others and may be NaN; their dS is 0.
  __device__ void clear_foreign_keys() {
    mbarrier_wait(&shared_.k_full[kv_ring_.index], kv_ring_.parity);
    const KeyItem item = broadcast(shared_.items[kv_ring_.index]);
    const int keys = item.k_end - item.k_begin;
    if (keys == Tile::kKeys) return;
    clear_foreign_rows<typename Tile::QkTile, Tile::kKeys, Tile::kQkBoxes>(
        shared_.k[kv_ring_.index], 0, keys);
    fence_async_shared();
    named_barrier_sync(kBarrier, 128);
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  Ring<Tile::kScoreStages> score_ring_;
  Ring<Tile::kKvBuffers> kv_ring_;
  int note_ = 0;
  int piece_ = 0;
};

}  // namespace annulus::kernels::sm90
