#include "sharding/kv_feed.hpp"

#include <algorithm>
#include <functional>
#include <utility>

#include "kernels/error.hpp"
#include "sharding/join_rectangles.hpp"

namespace annulus {
namespace {

std::int64_t aligned(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

bool rows_are_contiguous(const ConstTensorView& view) {
  const bool heads_follow = view.shape[2] == 1 || view.strides[2] == view.shape[3];
  return view.strides[3] == 1 && heads_follow && view.strides[1] == view.shape[2] * view.shape[3];
}

TensorView writable(const ConstTensorView& view) {
  return {const_cast<void*>(view.data), view.dtype, view.shape, view.strides, view.device};
}

template <typename Visit>
void for_each_batch_row(const Piece& piece, std::int64_t batch, Visit visit) {
  if (piece.batch != Piece::kEveryBatch) return visit(piece.batch);
  for (std::int64_t b = 0; b < batch; ++b) visit(b);
}

}  // namespace

std::int64_t kv_bytes(const Shape& k, const Shape& v, DType dtype) {
  return aligned(k.elements() * size_bytes(dtype)) + v.elements() * size_bytes(dtype);
}

KvViews kv_views(void* memory, const Shape& k, const Shape& v, DType dtype, Device device) {
  auto* values = static_cast<std::byte*>(memory) + aligned(k.elements() * size_bytes(dtype));
  return {TensorView(memory, dtype, k, device), TensorView(values, dtype, v, device)};
}

RowBytes rows_of(const TensorView& view, std::int64_t batch, Span rows) {
  const std::int64_t element = size_bytes(view.dtype);
  const std::int64_t offset = batch * view.strides[0] + rows.begin * view.strides[1];
  return {static_cast<std::byte*>(view.data) + offset * element,
          rows.size() * view.strides[1] * element};
}

KvFeed::KvFeed(Communicator& ranks, const AttentionPlan& plan, const ConstTensorView& k,
               const ConstTensorView& v, const ExecuteOptions& options, Stream stream,
               Reading reading, int buffers)
    : ranks_(ranks),
      plan_(plan),
      k_(k),
      v_(v),
      stream_(stream),
      recorder_(options.recorder),
      batch_(k.shape[0]),
      slots_(static_cast<std::size_t>(buffers)) {
  require(ranks.size() == plan.groups() && ranks.rank() == plan.group(), ExitCode::internal,
          "{}: rank {} of {} runs the plan of rank {} of {}", name(plan.scheme()), ranks.rank(),
          ranks.size(), plan.group(), plan.groups());
  if (ranks.size() == 1) return;
  const RecordedSpan span(recorder_, StageRecord::Kind::share);
  if (options.in_place && ranks.reach() != Communicator::Reach::nobody) {
    share(reading);
  }
  if (!sends_to(false)) return;
  if (rows_are_contiguous(k_) && rows_are_contiguous(v_)) {
    sent_ = {writable(k_), writable(v_)};
    return;
  }
  packed_ = Buffer(k_.device, kv_bytes(k_.shape, v_.shape, k_.dtype), stream_);
  sent_ = kv_views(packed_.data(), k_.shape, v_.shape, k_.dtype, k_.device);
  copy(k_, sent_.k, stream_);
  copy(v_, sent_.v, stream_);
}

bool KvFeed::sends_to(bool readable_peers) const {
  for (const Stage& stage : plan_.stages()) {
    for (const Transfer& transfer : stage.sends) {
      if (readable(transfer.peer) == readable_peers) return true;
    }
  }
  return false;
}

void KvFeed::share(Reading reading) {
  struct Wanted {
    int sends;
    int stages;
    int together;
  };
  const std::span<const Stage> stages = plan_.stages();
  const Wanted mine{sends_to(false) ? 1 : 0, stages.empty() ? 0 : stages.back().number + 1,
                    reading == Reading::together && few_slices(plan_) ? 1 : 0};
  std::vector<Wanted> all(static_cast<std::size_t>(ranks_.size()));
  ranks_.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  bool any_sends = false;
  bool together = true;
  for (const Wanted& one : all) {
    most_stages_ = std::max(most_stages_, one.stages);
    any_sends = any_sends || one.sends != 0;
    together = together && one.together != 0;
  }
  if (!any_sends) return;
  Shape k = k_.shape;
  Shape v = v_.shape;
  k[1] = v[1] = plan_.kv_layout().max_rows();
  window_ = ranks_.expose(kv_bytes(k, v, k_.dtype), std::max<std::int64_t>(row_bytes(), 1));
  if (reading == Reading::joined ? joins_stages(plan_) : together) join();
  window_->begin_writes(stream_);
  copy_into_window();
  window_->fence(stream_);
}

// Windows at equal distances are one tensor: a rank's rows begin whole rows behind the first's.
void KvFeed::join() {
  const bool same_rows = k_.shape[2] == v_.shape[2] && k_.shape[3] == v_.shape[3];
  if (!same_rows || window_->stride() == 0) return;
  if (row_bytes() == 0 || window_->stride() % row_bytes() != 0) return;
  for (int peer = 0; peer < ranks_.size(); ++peer) {
    if (!readable(peer)) return;
  }
  StagePart part;
  std::vector<RowRun> runs;
  for (const SequenceLayout::Chunk& chunk : plan_.kv_layout().chunks()) {
    runs.push_back({joined_row(chunk.rank) + chunk.local_begin, chunk.global});
    part.rows.end = std::max(part.rows.end, runs.back().rows().end);
  }
  part.batch = {0, batch_};
  part.slices = join_rectangles(
      localize(plan_.request().mask, plan_.q_layout().runs(plan_.group()), {&runs, 1}));
  std::sort(runs.begin(), runs.end(),
            [](const RowRun& a, const RowRun& b) { return a.begin < b.begin; });
  part.positions = positions_of(runs);
  joined_ = std::move(part);
}

// The rows that peers want, and those that this rank itself reads beside theirs.
void KvFeed::copy_into_window() {
  const KvViews shared = window_views(window_->local());
  std::vector<Span> wanted;
  for (const Stage& stage : plan_.stages()) {
    for (const Transfer& transfer : stage.sends) {
      if (!readable(transfer.peer)) continue;
      for (const Piece& piece : transfer.pieces) wanted.push_back(piece.rows);
    }
    if (stage.number != 0 || !joined_) continue;
    for (const Slice& slice : stage.slices.slices) wanted.push_back(slice.k);
  }
  unite(wanted);
  shared_rows_ = 0;
  for (const Span rows : wanted) shared_rows_ += rows.size();
  if (2 * shared_rows_ > k_.shape[1]) {
    const TensorView& last = shared.v;
    window_->expect(0, static_cast<const std::byte*>(last.data) -
                           static_cast<const std::byte*>(window_->local()) +
                           last.shape.elements() * size_bytes(last.dtype));
  }
  for (const Span rows : wanted) {
    copy(k_.slice(1, rows), shared.k.slice(1, rows), stream_);
    copy(v_.slice(1, rows), shared.v.slice(1, rows), stream_);
  }
}

KvViews KvFeed::window_views(const void* memory) const {
  Shape k = k_.shape;
  Shape v = v_.shape;
  k[1] = v[1] = plan_.kv_layout().max_rows();
  return kv_views(const_cast<void*>(memory), k, v, k_.dtype, k_.device);
}

const std::byte* KvFeed::first_window() const {
  const void* first = window_->local();
  for (int peer = 0; peer < ranks_.size(); ++peer) {
    first = std::min(first, window_->peer(peer), std::less<>());
  }
  return static_cast<const std::byte*>(first);
}

std::int64_t KvFeed::joined_row(int peer) const {
  return (static_cast<const std::byte*>(window_->peer(peer)) - first_window()) / row_bytes();
}

std::pair<ConstTensorView, ConstTensorView> KvFeed::joined_views() const {
  KvViews views = window_views(first_window());
  views.k.shape[1] = views.v.shape[1] = joined_->rows.end;
  return {views.k, views.v};
}

bool KvFeed::in_place(const Stage& stage) const {
  if (stage.number == 0 || stage.receives.empty() || plan_.request().block_rows > 0) return false;
  const auto unreadable = [this](const Transfer& transfer) { return !readable(transfer.peer); };
  return few_pieces(stage) &&
         std::none_of(stage.receives.begin(), stage.receives.end(), unreadable);
}

void KvFeed::prepare_buffer(const Stage& stage) {
  Slot& slot = slot_of(stage);
  Shape k = k_.shape;
  Shape v = v_.shape;
  k[1] = v[1] = plan_.max_buffer_rows(stage.number % 2);
  const std::int64_t bytes = kv_bytes(k, v, k_.dtype);
  if (slot.memory.bytes() < bytes) slot.memory = Buffer(k_.device, bytes, stream_);
  k[1] = v[1] = stage.buffer_rows;
  slot.views = kv_views(slot.memory.data(), k, v, k_.dtype, k_.device);
}

void KvFeed::start(const Stage& stage) {
  if (stage.number == 0) return;
  Slot& slot = slot_of(stage);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (const Transfer& transfer : stage.sends) {
    if (readable(transfer.peer)) continue;
    for (const TensorView& view : {sent_.k, sent_.v}) {
      bool same = false;
      for (const Piece& piece : transfer.pieces) {
        for_each_batch_row(piece, batch_, [&](std::int64_t b) {
          const RowBytes rows = rows_of(view, b, piece.rows);
          sends.push_back({transfer.peer, rows.data, rows.bytes, std::exchange(same, true)});
        });
      }
    }
  }
  if (!in_place(stage) && stage.buffer_rows > 0) prepare_buffer(stage);
  for (const Transfer& transfer : stage.receives) {
    if (readable(transfer.peer)) continue;
    for (const TensorView& view : {slot.views.k, slot.views.v}) {
      bool same = false;
      for (const Piece& piece : transfer.pieces) {
        const Span held{piece.buffer_begin, piece.buffer_begin + piece.rows.size()};
        for_each_batch_row(piece, batch_, [&](std::int64_t b) {
          const RowBytes rows = rows_of(view, b, held);
          receives.push_back({transfer.peer, rows.data, rows.bytes, std::exchange(same, true)});
        });
      }
    }
  }
  if (!sends.empty() || !receives.empty()) {
    if (recorder_ != nullptr) slot.begin = recorder_->now();
    slot.exchange = ranks_.exchange(sends, receives, stream_);
  }
}

void KvFeed::wait(const Stage& stage, Stream stream) {
  Slot& slot = slot_of(stage);
  if (slot.exchange != nullptr) {
    slot.exchange->wait(stream);
    if (recorder_ != nullptr) record_transfer(stage);
  }
  slot.exchange.reset();
  if (stage.number > 0 && !in_place(stage)) copy_readable(stage);
}

// On a device by a stream that has nothing else to do than to wait for the rows.
void KvFeed::record_transfer(const Stage& stage) {
  Slot& slot = slot_of(stage);
  StageMoment end;
  if (k_.device == Device::cuda) {
    const Stream side = kernels::cuda::side_stream();
    slot.exchange->wait(side);
    end = StageMoment(side);
  }
  recorder_->add({StageRecord::Kind::transfer, stage.number, -1, received_bytes(stage), 0, 0},
                 std::move(slot.begin), std::move(end));
}

bool KvFeed::may_follow_kernel() const {
  return !shares() && std::all_of(slots_.begin(), slots_.end(), [](const Slot& slot) {
    return slot.exchange == nullptr || slot.exchange->may_follow_kernel();
  });
}

void KvFeed::progress() {
  for (Slot& slot : slots_) {
    if (slot.exchange != nullptr) slot.exchange->test();
  }
}

void KvFeed::copy_readable(const Stage& stage) {
  for (const Transfer& transfer : stage.receives) {
    if (!readable(transfer.peer)) continue;
    const KvViews from = window_views(window_->peer(transfer.peer));
    const KvViews& to = slot_of(stage).views;
    for (const Piece& piece : transfer.pieces) {
      const Span held{piece.buffer_begin, piece.buffer_begin + piece.rows.size()};
      const Span batch =
          piece.batch == Piece::kEveryBatch ? Span{0, batch_} : Span{piece.batch, piece.batch + 1};
      copy(from.k.slice(0, batch).slice(1, piece.rows), to.k.slice(0, batch).slice(1, held),
           stream_);
      copy(from.v.slice(0, batch).slice(1, piece.rows), to.v.slice(0, batch).slice(1, held),
           stream_);
    }
  }
}

void KvFeed::take_turn() {
  if (window_ != nullptr) window_->take_turn();
}

void KvFeed::end_turn(bool last) {
  if (window_ != nullptr) window_->end_turn(last, stream_);
}

void KvFeed::close() {
  if (window_ != nullptr) window_->end_reads(stream_);
}

KvFeed::RowsInPlace KvFeed::rows_in_place(int group) const {
  const KvViews peer = group == ranks_.rank() ? KvViews{writable(k_), writable(v_)}
                                              : window_views(window_->peer(group));
  const std::span<const RowRun> held = plan_.kv_layout().runs(group);
  const std::vector<RowRun> runs(held.begin(), held.end());
  return {peer.k, peer.v,
          localize(plan_.request().mask, plan_.q_layout().runs(plan_.group()), {&runs, 1})};
}

std::pair<ConstTensorView, ConstTensorView> KvFeed::views(const Stage& stage,
                                                          const StagePart& part) const {
  ConstTensorView k = k_;
  ConstTensorView v = v_;
  Span rows = part.rows;
  if (part.peer >= 0) {
    const KvViews peer = window_views(window_->peer(part.peer));
    k = peer.k;
    v = peer.v;
    rows = {part.peer_row, part.peer_row + part.rows.size()};
  } else if (stage.number > 0) {
    k = slot_of(stage).views.k;
    v = slot_of(stage).views.v;
  }
  return {k.slice(0, part.batch).slice(1, rows), v.slice(0, part.batch).slice(1, rows)};
}

std::int64_t KvFeed::bytes_of(const Stage& stage, bool in_place) const {
  std::int64_t rows = 0;
  for (const Transfer& transfer : stage.receives) {
    const bool remote = transfer.peer != ranks_.rank();
    if (remote && readable(transfer.peer) == in_place) rows += transfer.rows(batch_);
  }
  return rows * k_.shape[2] * (k_.shape[3] + v_.shape[3]) * size_bytes(k_.dtype);
}

std::int64_t KvFeed::read_bytes() const {
  std::int64_t bytes = 0;
  for (const Stage& stage : plan_.stages()) bytes += read_bytes(stage);
  return bytes;
}

std::int64_t KvFeed::buffer_bytes() const {
  std::int64_t bytes = packed_.bytes();
  for (const Slot& slot : slots_) bytes += slot.memory.bytes();
  // Pages of a window that nobody reads are never touched.
  bytes += batch_ * shared_rows_ * k_.shape[2] * (k_.shape[3] + v_.shape[3]) * size_bytes(k_.dtype);
  return bytes;
}

}  // namespace annulus
