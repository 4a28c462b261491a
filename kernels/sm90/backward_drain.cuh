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
    std::uint32_t parity = 0;
    for (int at = 0;; at = at + 1 == Tile::kNotes ? 0 : at + 1) {
      mbarrier_wait(&shared_.grad_q_full[0], parity);
      const QueryNote note = shared_.notes[at];
      if ((note.flags & kNoMoreItems) != 0) break;
      const bool wanted = params_.grad_q.data != nullptr;
      if constexpr (Tile::kOrdered) await_turn(note, shared_.turns[at]);
      if (wanted) send(note, 0);
      mbarrier_wait(&shared_.grad_q_full[1], parity);
      if (wanted) send(note, 1);
      bulk_wait_read<1>();
      mbarrier_arrive(&shared_.grad_q_empty[0]);
      bulk_wait_read<0>();
      mbarrier_arrive(&shared_.grad_q_empty[1]);
      if constexpr (Tile::kOrdered) {
        // This block's additions are under way; those of the one before get done meanwhile.
        pass_turn<2>();
        passed_ = turn_at(note);
        next_turn_ = turn_ + 1;
      }
      parity ^= 1;
    }
    if constexpr (Tile::kOrdered) pass_turn<0>();
    bulk_wait<0>();
  }

 private:
  /// A warpgroup's half, as one group. Rows outside the slice hold zeros.
  __device__ void send(const QueryNote& note, int half) {
    const int column = Tile::kColumnHalves ? half * 64 : 0;
    const int row = note.q_begin + (Tile::kColumnHalves ? 0 : half * Tile::kDrainRows);
    for (int piece = 0; piece < 2; ++piece) {
      tma_reduce_add(&params_.grad_q_map, shared_.grad_q[half][piece], column + piece * 32, row,
                     note.head, note.batch);
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

  /// Whoever may have to wait lets others go on first.
  __device__ void await_turn(const QueryNote& note, std::uint32_t turn) {
    const std::uint32_t* counter = turn_at(note);
    turn_ = turn;
    if (turn_of(counter) != turn) {
      pass_turn<0>();
      while (turn_of(counter) != turn) continue;
    }
    fence_async_global();
  }

  /// Of the block before, with at most kPending younger groups on their way: only once its
  /// additions are complete; that the copy engine has read their source is not enough.
  template <int kPending>
  __device__ void pass_turn() {
    if (passed_ == nullptr) return;
    bulk_wait<kPending>();
    fence_async_global();
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(passed_), "r"(next_turn_) : "memory");
    passed_ = nullptr;
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  std::uint32_t turn_ = 0;           // of the block at hand
  std::uint32_t* passed_ = nullptr;  // counter of the block before, until it is set
  std::uint32_t next_turn_ = 0;
};

}  // namespace annulus::kernels::sm90
