#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kernels/buffer.hpp"
#include "sharding/gradient_tree.hpp"
#include "sharding/kv_feed.hpp"

namespace annulus {

/// Takes fp32 partials of dK and dV back to the ranks that own the rows, one stage behind, and adds
/// what other ranks computed for this rank's rows in the order of the stages; or, where the plan
/// has a grid of queries, several partials for each row, which go up its tree.
///
/// A rank that can read its peers' memory adds their partials from where they lie: a message says
/// where that is, and another one that the memory may be used again.
class GradientReturn {
 public:
  /// `local.grad_k` and `local.grad_v` are this rank's own, [batch, rows, kv_heads, dim], or with a
  /// head for each query head where the plan has a grid of queries. `in_place`, the same on all
  /// ranks: partials lie where peers of a node can read them; collective then.
  GradientReturn(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                 bool in_place);

  /// Clears the partials of the stage's buffer rows.
  void prepare(const Stage& stage);
  /// Where they are, one for each node of the grid of queries; those of stage 0 are the own ones.
  std::span<const KvViews> partials(const Stage& stage) const;
  /// @pre the plan has a grid of queries
  GradientTree& tree() { return *tree_; }
  /// Starts to return them.
  void start(const Stage& stage);
  /// Returns when the stage's partials of other ranks are added.
  void finish(const Stage& stage);
  /// Returns when all peers have what this rank computed for them.
  void close();
  void progress();
  std::int64_t buffer_bytes() const;
  /// Of peers' partials that were added from where they lie.
  std::int64_t read_bytes() const { return read_bytes_; }

 private:
  struct Slot {
    Buffer outgoing;
    std::int64_t shared_bytes = 0;  // the same in the window
    std::vector<KvViews> views;
    Buffer incoming;
    std::unique_ptr<Exchange> exchange;
    std::vector<std::vector<std::int64_t>> places_out;  // by transfer of stage.receives
    std::vector<std::vector<std::int64_t>> places_in;   // by transfer of stage.sends
    std::unique_ptr<Exchange> release;
    std::vector<std::byte> releases;
  };

  Slot& slot_of(const Stage& stage) { return slots_[static_cast<std::size_t>(stage.number % 2)]; }
  const Slot& slot_of(const Stage& stage) const {
    return slots_[static_cast<std::size_t>(stage.number % 2)];
  }
  bool readable(int peer) const { return window_ != nullptr && window_->peer(peer) != nullptr; }
  /// Partials that a rank gives for each row.
  std::int64_t copies(int group) const;
  Shape partial_shape(const TensorView& own, std::int64_t rows) const;
  std::int64_t slot_bytes(int slot) const;
  void* outgoing_memory(const Stage& stage);
  /// Calls visit(rows of a batch row) for K and V of each piece that goes out.
  template <typename Visit>
  void for_each_outgoing(const Transfer& transfer, const Slot& slot, Visit visit) const;
  // A partial for some own rows of a batch row.
  struct Arrival {
    int peer;
    std::size_t node;
    std::int64_t batch;
    Span rows;
    KvSide side;
    TensorView part;
  };
  /// Calls visit(arrival) for K and V of each piece, in the order of arrival.
  template <typename Visit>
  void for_each_incoming(const Stage& stage, const Slot& slot, Visit visit) const;
  std::int64_t incoming_bytes(const Stage& stage) const;
  void add_places(const Stage& stage, Slot& slot, std::vector<Send>& sends,
                  std::vector<Receive>& receives) const;
  void take(const Arrival& arrival);
  void release_peers(const Stage& stage, Slot& slot);

  Communicator& ranks_;
  const AttentionPlan& plan_;
  TensorView grad_k_;
  TensorView grad_v_;
  KvViews own_;
  std::int64_t heads_;  // of the partials
  Stream stream_;
  std::optional<GradientTree> tree_;
  mutable std::map<int, std::int64_t> copies_;  // by group
  std::unique_ptr<Window> window_;
  std::int64_t read_bytes_ = 0;
  std::array<Slot, 2> slots_;
};

}  // namespace annulus
