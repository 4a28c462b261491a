#pragma once

#include "kernels/sm90/backward_tile.cuh"
#include "kernels/sm90/tma.cuh"

/// The thread that has the copy engine add what two warpgroups stage of dQ to global memory.
namespace annulus::kernels::sm90 {

template <typename Tile>
class BackwardDrain {
 public:
  __device__ BackwardDrain(const BackwardParams& params, SharedBackward<Tile>& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    Ring<Tile::kTurns ? Tile::kGroups : 1> turn;
    for (Ring<Tile::kNotes> at;; at.advance()) {
      mbarrier_wait(&shared_.grad_q_full[turn.index], turn.parity);
      const QueryNote note = shared_.notes[at.index];
      if ((note.flags & kNoMoreItems) != 0) break;
      const bool wanted = params_.grad_q.data != nullptr;
      if (wanted) send(note, turn.index, 0);
      if constexpr (!Tile::kTurns) {
        mbarrier_wait(&shared_.grad_q_full[1], turn.parity);
        if (wanted) send(note, 1, 64);
        bulk_wait_read<1>();
        mbarrier_arrive(&shared_.grad_q_empty[0]);
      }
      bulk_wait_read<0>();
      mbarrier_arrive(&shared_.grad_q_empty[Tile::kTurns ? turn.index : 1]);
      turn.advance();
    }
    bulk_wait<0>();
  }

 private:
  /// What a warpgroup has staged, 64 columns from `column`, as one group of the copy engine. Rows
  /// outside the slice hold zeros.
  __device__ void send(const QueryNote& note, int group, int column) {
    for (int piece = 0; piece < 2; ++piece) {
      tma_reduce_add(&params_.grad_q_map, shared_.grad_q[group][piece], column + piece * 32,
                     note.q_begin, note.head, note.batch);
    }
    bulk_commit();
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
};

}  // namespace annulus::kernels::sm90
