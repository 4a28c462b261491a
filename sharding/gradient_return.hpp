#pragma once

#include <array>
#include <memory>
#include <vector>

#include "kernels/buffer.hpp"
#include "sharding/kv_feed.hpp"

namespace annulus {

/// Takes fp32 partials of dK and dV back to the ranks that own the rows, one stage behind, and adds
/// what other ranks computed for this rank's rows in the order of the stages.
class GradientReturn {
 public:
  /// `grad_k` and `grad_v` are this rank's own, shaped [batch, rows, kv_heads, dim].
  GradientReturn(Communicator& ranks, const AttentionPlan& plan, const TensorView& grad_k,
                 const TensorView& grad_v, Stream stream);

  /// Cleared gradients of the stage's buffer rows.
  KvViews gradients(const Stage& stage);
  /// Starts to return them.
  void start(const Stage& stage);
  /// Returns when the stage's partials of other ranks are added.
  void finish(const Stage& stage);
  void progress();
  std::int64_t buffer_bytes() const;

 private:
  struct Slot {
    Buffer outgoing;
    KvViews views;
    Buffer incoming;
    std::unique_ptr<Exchange> exchange;
  };

  Slot& slot_of(const Stage& stage) { return slots_[static_cast<std::size_t>(stage.number % 2)]; }
  /// Calls visit(peer, batch row, own rows, part of the incoming buffer) in the order of arrival.
  template <typename Visit>
  void for_each_incoming(const Stage& stage, Slot& slot, Visit visit) const;

  Communicator& ranks_;
  const AttentionPlan& plan_;
  TensorView grad_k_;
  TensorView grad_v_;
  Stream stream_;
  std::array<Slot, 2> slots_;
};

}  // namespace annulus
