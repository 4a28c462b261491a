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
      if constexpr (Tile::kOrdered) {  // while dQ is still being multiplied
        mbarrier_wait(&shared_.note_full[at.index], at.parity);
        await_turn(shared_.notes[at.index], shared_.turns[at.index]);
      }
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

  /// The counter of this block of queries.
  __device__ std::uint32_t* turn_at(const QueryNote& note) const {
    const std::int64_t head = std::int64_t{note.batch} * params_.q_heads + note.head;
    return params_.turns + head * params_.turn_rows + note.q_begin / 16;
  }

  __device__ static std::uint32_t turn_of(const std::uint32_t* counter) {
    std::uint32_t turn = 0;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(turn) : "l"(counter) : "memory");
    return turn;
  }

  /// Passes on the turn of the block before, then waits for this one's.
  __device__ void await_turn(const QueryNote& note, std::uint32_t turn) {
    pass_turn();
    if ((note.flags & kNoMoreItems) != 0) return;
    passed_ = turn_at(note);
    while (turn_of(passed_) != turn) continue;
    next_turn_ = turn + 1;
    fence_async_global();
  }

  /// Only once the block's additions are complete; that the copy engine has read their source is
  /// not enough. To have seen the completion orders them before the store (PTX ISA, async proxy).
  __device__ void pass_turn() {
    if (passed_ == nullptr) return;
    bulk_wait<0>();
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(passed_), "r"(next_turn_) : "memory");
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  std::uint32_t* passed_ = nullptr;  // counter of the last block whose turn came
  std::uint32_t next_turn_ = 0;
};

}  // namespace annulus::kernels::sm90
