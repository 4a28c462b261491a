#pragma once

#include <cmath>

#include "kernels/sm90/backward_tile.cuh"

/// LSE and delta of the rows of each block of queries. Where a block passes in less time than their
/// loads take (drained divisions), a warp of its own loads them, so that no copy waits behind them,
/// and they count among what a block of Q waits for; else the producing warp does.
namespace annulus::kernels::sm90 {

template <typename Tile>
class BackwardRows {
 public:
  __device__ BackwardRows(const BackwardParams& params, SharedBackward<Tile>& shared)
      : params_(params), shared_(shared), lane_(static_cast<int>(threadIdx.x % 32)) {}

  __device__ void run() {
    Ring<Tile::kStages> ring;
    for (Ring<Tile::kNotes> at;; at.advance()) {
      mbarrier_wait(&shared_.note_full[at.index], at.parity);
      const QueryNote& note = shared_.notes[at.index];
      if ((note.flags & kNoMoreItems) != 0) return;
      load(note);
      mbarrier_wait(&shared_.grad_o_empty[ring.index], ring.parity ^ 1);
      store(ring.index);
      ring.advance();
    }
  }

  /// To registers: all lanes of the warp.
  __device__ void load(const QueryNote& note) {
    const RowStrides& of_lse = params_.lse_strides;
    const RowStrides& of_delta = params_.delta_strides;
    const float* lse = params_.lse + note.batch * of_lse.batch + note.head * of_lse.head;
    const float* delta = params_.delta + note.batch * of_delta.batch + note.head * of_delta.head;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = note.q_begin + lane_ + 32 * i;
      const bool valid = row >= note.slice_q_begin && row < note.slice_q_end;
      lse_[i] = valid ? lse[row * of_lse.row] : -INFINITY;
      delta_[i] = valid ? delta[row * of_delta.row] : 0.0F;
    }
  }

  /// To a stage that is empty. A row without keys (LSE -inf) or outside the slice gets LSE +inf, so
  /// that P = exp2(S - inf) = 0, and δ 0. Where dQ is drained, dP is added to −δ, and LSE may leave
  /// P a factor.
  __device__ void store(int stage) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool empty = lse_[i] == -INFINITY;
      if (Tile::kQueries % 32 != 0 && lane_ + 32 * i >= Tile::kQueries) break;
      float lse = lse_[i] * 1.4426950408889634F;
      if constexpr (Tile::kScaledGradient) lse -= __log2f(params_.scale);
      shared_.lse[stage][lane_ + 32 * i] = empty ? INFINITY : lse;
      shared_.delta[stage][lane_ + 32 * i] = empty ? 0.0F : Tile::kDrained ? -delta_[i] : delta_[i];
    }
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive(Tile::kDrained ? &shared_.q_full[stage] : &shared_.rows_full[stage]);
    }
  }

 private:
  static constexpr int kEach = (Tile::kQueries + 31) / 32;

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  const int lane_;
  float lse_[kEach], delta_[kEach];
};

}  // namespace annulus::kernels::sm90
