#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/buffer.hpp"
#include "sharding/execution.hpp"
#include "sharding/stage_parts.hpp"

namespace annulus {

/// [batch, rows, heads, dim] of contiguous memory for keys, and the same for values behind it.
struct KvViews {
  TensorView k;
  TensorView v;
};
/// Bytes of both; values start at a multiple of 64.
std::int64_t kv_bytes(const Shape& k, const Shape& v, DType dtype);
KvViews kv_views(void* memory, const Shape& k, const Shape& v, DType dtype, Device device);

/// Rows [rows) of one batch row, in elements of memory that is contiguous from row to row.
struct RowBytes {
  void* data = nullptr;
  std::int64_t bytes = 0;
};
RowBytes rows_of(const TensorView& view, std::int64_t batch, Span rows);

/// Brings each stage's KV rows to this rank and gives its own to others.
///
/// Received rows lie in buffers that take turns. Peers whose memory can be read are not sent
/// messages: their rows are read where they lie, or copied into the buffer when the caller wants
/// them in one piece.
class KvFeed {
 public:
  enum class Reading : std::uint8_t {
    stages,    // one after the other
    joined,    // all at once where that is possible
    together,  // the same, but only where it is possible on all ranks, and all ask for it
  };

  /// `buffers`: stages whose rows are held at a time. Collective when `in_place` is asked for.
  KvFeed(Communicator& ranks, const AttentionPlan& plan, const ConstTensorView& k,
         const ConstTensorView& v, const ExecuteOptions& options, Stream stream,
         Reading reading = Reading::stages, int buffers = 2);

  /// Starts to move the rows of a stage; its buffer must not be in use.
  void start(const Stage& stage);
  /// Returns when they are there; on a device makes the stream wait for them.
  void wait(const Stage& stage) { wait(stage, stream_); }
  void wait(const Stage& stage, Stream stream);
  /// Of all that is started: see Exchange. Nothing is then copied by wait() either.
  bool may_follow_kernel() const;
  /// Moves transfers on; cheap.
  void progress();

  /// All stages as one part, where every row that they need can be read where it lies; absent
  /// otherwise. Its rows are those of joined_views().
  const std::optional<StagePart>& joined() const { return joined_; }
  std::pair<ConstTensorView, ConstTensorView> joined_views() const;
  /// From where a rank's rows begin in them to where the next one's do. @pre joined()
  std::int64_t rows_apart() const { return window_->stride() / row_bytes(); }
  /// True when some peers read each other's rows. The same on all ranks.
  bool shares() const { return window_ != nullptr; }
  /// Keys and values of a whole shard and the mask's slices over them, in its own rows.
  struct RowsInPlace {
    ConstTensorView k;
    ConstTensorView v;
    MaskSlices slices;
  };
  /// @pre shares(), and the shard is this rank's or a readable peer's
  RowsInPlace rows_in_place(int group) const;
  /// Where rows are shared, of the rank with the most stages: the turns that a pass may take.
  int most_stages() const { return most_stages_; }
  /// See Window; nothing where no rows are shared.
  void take_turn();
  void end_turn(bool last);
  /// After the last kernel that reads peers' rows where they lie was queued.
  void close();

  /// True when the stage's rows are read where they lie: its parts are then pieces.
  bool in_place(const Stage& stage) const;
  /// Keys and values of a part's rows, for its batch rows.
  std::pair<ConstTensorView, ConstTensorView> views(const Stage& stage,
                                                    const StagePart& part) const;
  std::int64_t buffer_bytes() const;
  /// Of the stage's rows, those that peers send, and those that are read from their memory.
  std::int64_t received_bytes(const Stage& stage) const { return bytes_of(stage, false); }
  std::int64_t read_bytes(const Stage& stage) const { return bytes_of(stage, true); }
  std::int64_t read_bytes() const;

 private:
  struct Slot {
    Buffer memory;
    KvViews views;
    std::unique_ptr<Exchange> exchange;
    StageMoment begin;  // of the exchange, where it is recorded
  };

  /// Makes the rows that peers want readable for those of them that can read. Collective.
  void share(Reading reading);
  void join();
  void copy_into_window();
  bool sends_to(bool readable_peers) const;
  bool readable(int peer) const { return window_ != nullptr && window_->peer(peer) != nullptr; }
  /// A rank's rows in its window, which has room for those of the rank with the most.
  KvViews window_views(const void* memory) const;
  std::int64_t row_bytes() const { return k_.shape[2] * k_.shape[3] * size_bytes(k_.dtype); }
  /// The first of the ranks' windows, and where a rank's rows begin in it.
  const std::byte* first_window() const;
  std::int64_t joined_row(int peer) const;
  Slot& slot_of(const Stage& stage) {
    return slots_[static_cast<std::size_t>(stage.number) % slots_.size()];
  }
  const Slot& slot_of(const Stage& stage) const {
    return slots_[static_cast<std::size_t>(stage.number) % slots_.size()];
  }
  std::int64_t bytes_of(const Stage& stage, bool in_place) const;
  void prepare_buffer(const Stage& stage);
  void record_transfer(const Stage& stage);
  void copy_readable(const Stage& stage);

  Communicator& ranks_;
  const AttentionPlan& plan_;
  ConstTensorView k_;  // of this rank
  ConstTensorView v_;
  Stream stream_;
  StageRecorder* recorder_;
  std::int64_t batch_ = 0;
  int most_stages_ = 0;
  Buffer packed_;
  KvViews sent_;  // the same in contiguous rows, where messages are sent
  std::unique_ptr<Window> window_;
  std::int64_t shared_rows_ = 0;  // of the window, of each batch row
  std::optional<StagePart> joined_;
  std::vector<Slot> slots_;
};

}  // namespace annulus
