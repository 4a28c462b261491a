#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "kernels/buffer.hpp"
#include "sharding/attention_plan.hpp"
#include "sharding/communicator.hpp"

namespace annulus {

/// Trades rows for heads among the ranks that exchange heads: from all heads of a rank's own rows
/// to a share of the heads of all the group's rows, and back. Views are [batch, rows, heads, dim]
/// of any strides; the group's rows are in global order.
class HeadExchange {
 public:
  enum class Rows : std::uint8_t { queries, keys };

  /// Tensors that travel together, in one exchange. All ranks add the same, in the same order.
  class Bundle {
   public:
    explicit Bundle(HeadExchange& exchange) : exchange_(&exchange) {}

    /// heads_of[j] are the heads, of the local view, that rank j computes. Returns where they will
    /// be: [batch, group rows, own heads, dim], contiguous, as long as the bundle lives.
    TensorView to_heads(Rows rows, const ConstTensorView& local, std::span<const Span> heads_of);
    /// Back from [batch, group rows, own heads, dim], which must live until wait(). `add` sums f32
    /// where ranks share heads, in the order of the ranks; else the heads must not overlap.
    void to_rows(Rows rows, const TensorView& theirs, std::span<const Span> heads_of,
                 const TensorView& local, bool add);

    void start();
    /// On a device queues what arrives as soon as it is announced, so that it does not wait for
    /// what the stream is given next.
    void receive();
    /// Returns when it is done; then all views are complete.
    void wait();
    std::int64_t buffer_bytes() const;

   private:
    struct Pack {
      Rows rows;
      ConstTensorView from;
    };
    struct Stay {
      ConstTensorView from;
      TensorView to;
    };
    struct Arrival {
      TensorView from;
      TensorView into;
      bool add = false;
    };

    void pack();

    HeadExchange* exchange_;
    std::map<int, std::vector<Pack>> packs_;  // by peer
    std::vector<Send> sends_;
    std::vector<Receive> receives_;
    std::vector<Stay> stays_;  // rows of this rank for its own heads
    std::vector<Arrival> arrivals_;
    Buffer packed_;  // until it has left
    std::vector<Buffer> memory_;
    std::unique_ptr<Exchange> under_way_;
  };

  /// `heads` are the ranks of plan.head_ranks(), in their order.
  HeadExchange(Communicator& heads, const AttentionPlan& plan, Stream stream);

 private:
  const SequenceLayout& rank_layout(Rows rows) const;
  const SequenceLayout& group_layout(Rows rows) const;
  int rank_of(int head_rank) const { return plan_.group() * plan_.head_ranks() + head_rank; }
  /// Where a run of a rank stands in the group's rows.
  Span group_rows(Rows rows, const RowRun& run) const;

  Communicator& heads_;
  const AttentionPlan& plan_;
  Stream stream_;
};

}  // namespace annulus
