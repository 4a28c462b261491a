#pragma once

#include "kernels/sm90/backward_tile.cuh"
#include "kernels/sm90/backward_turns.cuh"
#include "kernels/sm90/tma.cuh"

/// In deterministic mode: the thread that has the copy engine add what warpgroups stage of dQ to
/// global memory, each block of queries once its turn has come. Of halves each has its own thread
/// and turns.
namespace annulus::kernels::sm90 {

/// An addition takes more than half of the time that a block of queries does. So its turn is passed
/// on beside what follows: once the next block has left, or where there is nothing to do but wait.
template <typename Tile>
class OrderedDrain {
 public:
  __device__ OrderedDrain(const BackwardParams& params, SharedBackward<Tile>& shared, int half)
      : params_(params), shared_(shared), half_(half) {}

  __device__ void run() {
    Ring<Tile::kTurns ? Tile::kGroups : 1> staged;
    for (Ring<Tile::kNotes> at;; at.advance()) {
      await(&shared_.note_full[at.index], at.parity);
      const QueryNote note = shared_.notes[at.index];
      const bool more = (note.flags & kNoMoreItems) == 0;
      if (more) await_turn(note, shared_.turns[at.index]);  // while dQ is still being multiplied
      const int group = Tile::kTurns ? staged.index : half_;
      await(&shared_.grad_q_full[group], staged.parity);
      if (!more) break;
      if (params_.grad_q.data != nullptr) send(note, group);
      bulk_wait_read<0>();
      mbarrier_arrive(&shared_.grad_q_empty[group]);
      if (sent_ != nullptr) {
        bulk_wait<1>();
        pass_turn();
      }
      sent_ = counter_;
      next_turn_ = turn_ + 1;
      staged.advance();
    }
    settle();
  }

 private:
  __device__ void await(std::uint64_t* barrier, std::uint32_t parity) {
    if (mbarrier_test(barrier, parity)) return;
    settle();
    mbarrier_wait(barrier, parity);
  }

  /// 64 columns, as one group of the copy engine. Rows outside the slice hold zeros.
  __device__ void send(const QueryNote& note, int group) {
    for (int piece = 0; piece < 2; ++piece) {
      tma_reduce_add(&params_.grad_q_map, shared_.grad_q[group][piece], half_ * 64 + piece * 32,
                     note.q_begin, note.head, note.batch);
    }
    bulk_commit();
  }

  __device__ void await_turn(const QueryNote& note, std::uint32_t turn) {
    const std::int64_t head = std::int64_t{note.batch} * params_.q_heads + note.head;
    counter_ = params_.turns + head * params_.turn_rows + note.q_begin / 16 + half_;
    turn_ = turn;
    if (current_turn(counter_) != turn) {
      settle();
      while (current_turn(counter_) != turn) continue;
    }
    fence_async_global();
  }

  __device__ void settle() {
    if (sent_ == nullptr) return;
    bulk_wait<0>();
    pass_turn();
  }

  /// Only once the additions are complete; that the copy engine has read their source is not
  /// enough. To have seen the completion orders them before the store (PTX ISA, async proxy).
  __device__ void pass_turn() {
    store_turn(sent_, next_turn_);
    sent_ = nullptr;
  }

  const BackwardParams& params_;
  SharedBackward<Tile>& shared_;
  const int half_;
  std::uint32_t* counter_ = nullptr;  // of the block whose turn has come
  std::uint32_t turn_ = 0;
  std::uint32_t* sent_ = nullptr;  // of the block before, until its turn is passed on
  std::uint32_t next_turn_ = 0;
};

}  // namespace annulus::kernels::sm90
