#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/buffer.hpp"
#include "sharding/attention_plan.hpp"
#include "sharding/communicator.hpp"
#include "sharding/execution.hpp"

namespace annulus {

/// A tensor on a device, and its memory.
struct DeviceTensor {
  Buffer memory;
  TensorView view;

  DeviceTensor() = default;
  DeviceTensor(DType dtype, const Shape& shape, Stream stream)
      : memory(Device::cuda, shape.elements() * size_bytes(dtype), stream),
        view(memory.data(), dtype, shape, Device::cuda) {}
};

/// A run of a rank's rows, and where it stands in some tensor.
struct RankRun {
  int rank = 0;
  RowRun run;
};

/// What goes where between ranks that exchange heads when each reads and writes its own rows where
/// they lie: rows of the heads that others compute leave straight from the caller's tensors. Views
/// are [batch, rows, heads, dim].
class OwnRows {
 public:
  /// Whether the call can be computed so; the same on all ranks.
  static bool apply(const Communicator& heads, const AttentionPlan& plan,
                    const AttentionProblem& local, const ExecuteOptions& options);

  explicit OwnRows(const AttentionPlan& plan);

  int self() const { return self_; }
  Span q_heads() const { return q_heads_; }
  Span kv_heads() const { return kv_heads_; }
  /// Query rows of all others, in global order one behind the other.
  std::span<const RankRun> others() const { return others_; }
  std::span<const RowRun> other_runs() const { return other_runs_; }
  std::int64_t other_rows() const { return other_rows_; }
  /// Keys of all rows, and of the others', as they stand in a tensor of all: in global order.
  std::span<const RowRun> all_keys() const { return all_keys_; }
  std::span<const RowRun> other_keys() const { return other_keys_; }
  std::span<const RankRun> keys_of_others() const { return keys_of_others_; }
  /// Puts this rank's own rows, for its KV heads, where they stand there.
  void place_own_keys(const ConstTensorView& own, const TensorView& all, Stream stream) const;

  /// KV heads that `q_heads` read, and what they are to the kernel.
  Span kv_heads_for(Span q_heads) const;
  HeadGroups groups_of(Span q_heads, Span kv_heads) const;

  /// `heads` of this rank's rows, of `layout`.
  void send_heads(const SequenceLayout& layout, const ConstTensorView& local, int peer, Span heads,
                  std::vector<Send>& sends) const;
  /// Rows of some ranks that stand in a contiguous tensor, to or from them.
  static void send_runs(const TensorView& rows, std::span<const RankRun> runs,
                        std::vector<Send>& sends);
  static void receive_runs(const TensorView& rows, std::span<const RankRun> runs,
                           std::vector<Receive>& receives);

 private:
  const AttentionPlan& plan_;
  int self_;
  Span q_heads_;
  Span kv_heads_;
  std::vector<RankRun> others_;
  std::vector<RowRun> other_runs_;
  std::int64_t other_rows_ = 0;
  std::vector<RowRun> all_keys_;
  std::vector<RowRun> other_keys_;
  std::vector<RankRun> keys_of_others_;
};

/// The rows of `rank` as they stand in its shard, to or from `peer`.
std::vector<RankRun> runs_with(int peer, const SequenceLayout& layout, int rank);

/// The rows where the copy engine and kernels can read them: as they lie, or copied to `moved`.
ConstTensorView lying_well(const ConstTensorView& view, Stream stream,
                           std::vector<DeviceTensor>& moved);
bool lies_well(const ConstTensorView& view);

}  // namespace annulus
