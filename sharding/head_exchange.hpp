#pragma once

#include <cstdint>
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

  /// A transfer under way.
  class Pending {
   public:
    /// Returns when it is done; then `result` or the caller's tensor is complete.
    void wait();
    void progress();
    /// [batch, group rows, own heads, dim], contiguous; of to_heads().
    const TensorView& result() const { return result_; }
    std::int64_t buffer_bytes() const { return packed_.bytes() + memory_.bytes(); }

   private:
    friend class HeadExchange;
    struct Arrival {
      TensorView from;
      TensorView into;
    };
    std::vector<Arrival> arrivals_;
    bool add_ = false;
    Buffer packed_;
    Buffer memory_;
    TensorView result_;
    std::unique_ptr<Exchange> exchange_;
    Stream stream_;
  };

  /// `heads` are the ranks of plan.head_ranks(), in their order.
  HeadExchange(Communicator& heads, const AttentionPlan& plan, Stream stream);

  /// heads_of[j] are the heads, of the local view, that rank j computes.
  Pending to_heads(Rows rows, const ConstTensorView& local, std::span<const Span> heads_of);
  /// Back from [batch, group rows, own heads, dim], which must live until wait(). `add` sums f32
  /// where ranks share heads, in the order of the ranks; else the heads must not overlap.
  Pending to_rows(Rows rows, const TensorView& theirs, std::span<const Span> heads_of,
                  const TensorView& local, bool add);

  std::vector<Span> q_heads() const;
  std::vector<Span> kv_heads() const;

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
