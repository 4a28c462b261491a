#include "sharding/gradient_return.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kFloatBytes = 4;

Span batch_rows(const Piece& piece, std::int64_t batch) {
  return piece.batch == Piece::kEveryBatch ? Span{0, batch} : Span{piece.batch, piece.batch + 1};
}

}  // namespace

GradientReturn::GradientReturn(Communicator& ranks, const AttentionPlan& plan,
                               const TensorView& grad_k, const TensorView& grad_v, Stream stream)
    : ranks_(ranks), plan_(plan), grad_k_(grad_k), grad_v_(grad_v), stream_(stream) {}

KvViews GradientReturn::gradients(const Stage& stage) {
  Slot& slot = slot_of(stage);
  Shape k = grad_k_.shape;
  Shape v = grad_v_.shape;
  k[1] = v[1] = plan_.max_buffer_rows();
  const std::int64_t most = kv_bytes(k, v, DType::f32);
  if (stage.buffer_rows > 0 && slot.outgoing.bytes() < most)
    slot.outgoing = Buffer(grad_k_.device, most, stream_);
  k[1] = v[1] = stage.buffer_rows;
  fill_bytes(slot.outgoing.data(), grad_k_.device, 0, kv_bytes(k, v, DType::f32), stream_);
  slot.views = kv_views(slot.outgoing.data(), k, v, DType::f32, grad_k_.device);
  return slot.views;
}

template <typename Visit>
void GradientReturn::for_each_incoming(const Stage& stage, Slot& slot, Visit visit) const {
  auto* next = static_cast<float*>(slot.incoming.data());
  for (const Transfer& transfer : stage.sends) {
    for (const Piece& piece : transfer.pieces) {
      const Span batch = batch_rows(piece, grad_k_.shape[0]);
      for (std::int64_t b = batch.begin; b < batch.end; ++b) {
        for (const TensorView& own : {grad_k_, grad_v_}) {
          const Shape shape{1, piece.rows.size(), own.shape[2], own.shape[3]};
          visit(transfer.peer, own.slice(0, {b, b + 1}).slice(1, piece.rows),
                TensorView(next, DType::f32, shape, own.device));
          next += shape.elements();
        }
      }
    }
  }
}

void GradientReturn::start(const Stage& stage) {
  Slot& slot = slot_of(stage);
  std::vector<Send> sends;
  for (const Transfer& transfer : stage.receives) {
    for (const Piece& piece : transfer.pieces) {
      const Span held{piece.buffer_begin, piece.buffer_begin + piece.rows.size()};
      const Span batch = batch_rows(piece, grad_k_.shape[0]);
      for (std::int64_t b = batch.begin; b < batch.end; ++b) {
        for (const TensorView& view : {slot.views.k, slot.views.v}) {
          const RowBytes rows = rows_of(view, b, held);
          sends.push_back({transfer.peer, rows.data, rows.bytes});
        }
      }
    }
  }
  std::int64_t rows = 0;
  for (const Transfer& transfer : stage.sends) rows += transfer.rows(grad_k_.shape[0]);
  const std::int64_t bytes =
      kFloatBytes * rows * grad_k_.shape[2] * (grad_k_.shape[3] + grad_v_.shape[3]);
  if (slot.incoming.bytes() < bytes) slot.incoming = Buffer(grad_k_.device, bytes, stream_);
  std::vector<Receive> receives;
  for_each_incoming(stage, slot, [&](int peer, const TensorView& /*own*/, const TensorView& part) {
    receives.push_back({peer, part.data, part.shape.elements() * kFloatBytes});
  });
  if (!sends.empty() || !receives.empty()) {
    slot.exchange = ranks_.exchange(sends, receives, stream_);
  }
}

void GradientReturn::finish(const Stage& stage) {
  Slot& slot = slot_of(stage);
  if (slot.exchange == nullptr) return;
  slot.exchange->wait(stream_);
  slot.exchange.reset();
  for_each_incoming(stage, slot, [&](int /*peer*/, const TensorView& own, const TensorView& part) {
    accumulate(part, own, stream_);
  });
}

void GradientReturn::progress() {
  for (Slot& slot : slots_) {
    if (slot.exchange != nullptr) slot.exchange->test();
  }
}

std::int64_t GradientReturn::buffer_bytes() const {
  std::int64_t bytes = 0;
  for (const Slot& slot : slots_) bytes += slot.outgoing.bytes() + slot.incoming.bytes();
  return bytes;
}

}  // namespace annulus
