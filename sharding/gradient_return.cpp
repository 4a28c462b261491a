#include "sharding/gradient_return.hpp"

#include <algorithm>
#include <atomic>

namespace annulus {
namespace {

constexpr std::int64_t kFloatBytes = 4;

Span batch_rows(const Piece& piece, std::int64_t batch) {
  return piece.batch == Piece::kEveryBatch ? Span{0, batch} : Span{piece.batch, piece.batch + 1};
}

std::int64_t pieces_of(const Transfer& transfer, std::int64_t batch) {
  std::int64_t pieces = 0;
  for (const Piece& piece : transfer.pieces) pieces += batch_rows(piece, batch).size();
  return pieces;
}

std::int64_t round_up(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

GradientReturn::GradientReturn(Communicator& ranks, const AttentionPlan& plan,
                               const TensorView& grad_k, const TensorView& grad_v, bool in_place,
                               Stream stream)
    : ranks_(ranks), plan_(plan), grad_k_(grad_k), grad_v_(grad_v), stream_(stream) {
  if (in_place) window_ = ranks_.expose(slot_bytes(0) + slot_bytes(1));
}

// Partials of the largest stage that has the slot.
std::int64_t GradientReturn::slot_bytes(int slot) const {
  Shape k = grad_k_.shape;
  Shape v = grad_v_.shape;
  k[1] = v[1] = plan_.max_buffer_rows(slot);
  return round_up(kv_bytes(k, v, DType::f32));
}

void* GradientReturn::outgoing_memory(const Stage& stage) {
  const int slot = stage.number % 2;
  const std::int64_t bytes = slot_bytes(slot);
  if (window_ != nullptr) {
    const std::int64_t begin = slot == 0 ? 0 : slot_bytes(0);
    slot_of(stage).shared_bytes = bytes;
    window_->expect(begin, begin + bytes);
    return static_cast<std::byte*>(window_->local()) + begin;
  }
  Buffer& memory = slot_of(stage).outgoing;
  if (stage.buffer_rows > 0 && memory.bytes() < bytes) {
    memory = Buffer(grad_k_.device, bytes, stream_);
  }
  return memory.data();
}

KvViews GradientReturn::gradients(const Stage& stage) {
  Slot& slot = slot_of(stage);
  if (slot.release != nullptr) slot.release->wait();
  slot.release.reset();
  Shape k = grad_k_.shape;
  Shape v = grad_v_.shape;
  k[1] = v[1] = stage.buffer_rows;
  if (stage.buffer_rows == 0) return {};
  void* const memory = outgoing_memory(stage);
  fill_bytes(memory, grad_k_.device, 0, kv_bytes(k, v, DType::f32), stream_);
  slot.views = kv_views(memory, k, v, DType::f32, grad_k_.device);
  return slot.views;
}

template <typename Visit>
void GradientReturn::for_each_outgoing(const Transfer& transfer, const Slot& slot,
                                       Visit visit) const {
  for (const Piece& piece : transfer.pieces) {
    const Span held{piece.buffer_begin, piece.buffer_begin + piece.rows.size()};
    const Span batch = batch_rows(piece, grad_k_.shape[0]);
    for (std::int64_t b = batch.begin; b < batch.end; ++b) {
      for (const TensorView& view : {slot.views.k, slot.views.v}) visit(rows_of(view, b, held));
    }
  }
}

template <typename Visit>
void GradientReturn::for_each_incoming(const Stage& stage, const Slot& slot, Visit visit) const {
  auto* next = static_cast<float*>(slot.incoming.data());
  for (std::size_t i = 0; i < stage.sends.size(); ++i) {
    const Transfer& transfer = stage.sends[i];
    const bool in_place = readable(transfer.peer);
    const std::int64_t* place = in_place ? slot.places_in[i].data() : nullptr;
    for (const Piece& piece : transfer.pieces) {
      const Span batch = batch_rows(piece, grad_k_.shape[0]);
      for (std::int64_t b = batch.begin; b < batch.end; ++b) {
        for (const TensorView& own : {grad_k_, grad_v_}) {
          const Shape shape{1, piece.rows.size(), own.shape[2], own.shape[3]};
          const void* from = next;
          if (in_place) {
            from = static_cast<const std::byte*>(window_->peer(transfer.peer)) + *place++;
          } else {
            next += shape.elements();
          }
          visit(transfer.peer, own.slice(0, {b, b + 1}).slice(1, piece.rows),
                TensorView(const_cast<void*>(from), DType::f32, shape, own.device));
        }
      }
    }
  }
}

std::int64_t GradientReturn::incoming_bytes(const Stage& stage) const {
  std::int64_t rows = 0;
  for (const Transfer& transfer : stage.sends) {
    if (!readable(transfer.peer)) rows += transfer.rows(grad_k_.shape[0]);
  }
  return kFloatBytes * rows * grad_k_.shape[2] * (grad_k_.shape[3] + grad_v_.shape[3]);
}

// Where the partials for each readable peer lie in the window.
void GradientReturn::add_places(const Stage& stage, Slot& slot, std::vector<Send>& sends,
                                std::vector<Receive>& receives) const {
  const std::int64_t batch = grad_k_.shape[0];
  slot.places_out.assign(stage.receives.size(), {});
  for (std::size_t i = 0; i < stage.receives.size(); ++i) {
    const Transfer& transfer = stage.receives[i];
    if (!readable(transfer.peer)) continue;
    std::vector<std::int64_t>& places = slot.places_out[i];
    const auto* const begin = static_cast<const std::byte*>(window_->local());
    for_each_outgoing(transfer, slot, [&](const RowBytes& rows) {
      places.push_back(static_cast<const std::byte*>(rows.data) - begin);
    });
    sends.push_back({transfer.peer, places.data(),
                     static_cast<std::int64_t>(places.size() * sizeof(std::int64_t))});
  }
  slot.places_in.assign(stage.sends.size(), {});
  for (std::size_t i = 0; i < stage.sends.size(); ++i) {
    const Transfer& transfer = stage.sends[i];
    if (!readable(transfer.peer)) continue;
    std::vector<std::int64_t>& places = slot.places_in[i];
    places.resize(static_cast<std::size_t>(2 * pieces_of(transfer, batch)));
    receives.push_back({transfer.peer, places.data(),
                        static_cast<std::int64_t>(places.size() * sizeof(std::int64_t))});
  }
}

void GradientReturn::start(const Stage& stage) {
  Slot& slot = slot_of(stage);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (const Transfer& transfer : stage.receives) {
    if (readable(transfer.peer)) continue;
    for_each_outgoing(transfer, slot, [&](const RowBytes& rows) {
      sends.push_back({transfer.peer, rows.data, rows.bytes});
    });
  }
  const std::int64_t bytes = incoming_bytes(stage);
  if (slot.incoming.bytes() < bytes) slot.incoming = Buffer(grad_k_.device, bytes, stream_);
  add_places(stage, slot, sends, receives);
  for_each_incoming(stage, slot, [&](int peer, const TensorView& /*own*/, const TensorView& part) {
    if (readable(peer)) return;
    receives.push_back({peer, part.data, part.shape.elements() * kFloatBytes});
  });
  if (sends.empty() && receives.empty()) return;
  std::atomic_thread_fence(std::memory_order_seq_cst);  // what peers read is written
  slot.exchange = ranks_.exchange(sends, receives, stream_);
}

void GradientReturn::finish(const Stage& stage) {
  Slot& slot = slot_of(stage);
  if (slot.exchange == nullptr) return;
  slot.exchange->wait(stream_);
  slot.exchange.reset();
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for_each_incoming(stage, slot, [&](int peer, const TensorView& own, const TensorView& part) {
    accumulate(part, own, stream_);
    const bool read = peer != ranks_.rank() && readable(peer);
    read_bytes_ += read ? part.shape.elements() * kFloatBytes : 0;
  });
  release_peers(stage, slot);
}

// Peers may use the memory again that was read here, and this rank what its peers have read.
void GradientReturn::release_peers(const Stage& stage, Slot& slot) {
  slot.releases.assign(stage.sends.size() + stage.receives.size(), std::byte{1});
  std::vector<Send> sends;
  std::vector<Receive> receives;
  std::byte* next = slot.releases.data();
  for (const Transfer& transfer : stage.sends) {
    if (readable(transfer.peer)) sends.push_back({transfer.peer, next++, 1});
  }
  for (const Transfer& transfer : stage.receives) {
    if (readable(transfer.peer)) receives.push_back({transfer.peer, next++, 1});
  }
  if (!sends.empty() || !receives.empty()) slot.release = ranks_.exchange(sends, receives);
}

void GradientReturn::close() {
  for (Slot& slot : slots_) {
    if (slot.release != nullptr) slot.release->wait();
    slot.release.reset();
  }
}

void GradientReturn::progress() {
  for (Slot& slot : slots_) {
    if (slot.exchange != nullptr) slot.exchange->test();
    if (slot.release != nullptr) slot.release->test();
  }
}

std::int64_t GradientReturn::buffer_bytes() const {
  std::int64_t bytes = 0;
  for (const Slot& slot : slots_) {
    bytes += slot.shared_bytes + slot.outgoing.bytes() + slot.incoming.bytes();
  }
  return bytes;
}

}  // namespace annulus
