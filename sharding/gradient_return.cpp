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
                               const BackwardCall& local, bool in_place)
    : ranks_(ranks),
      plan_(plan),
      grad_k_(local.grad_k),
      grad_v_(local.grad_v),
      own_{grad_k_, grad_v_},
      heads_(grad_k_.shape[2]),
      stream_(local.stream) {
  if (plan.request().q_block_rows > 0) {
    heads_ = local.problem.q_heads();
    tree_.emplace(
        plan, GradientTree::Own{grad_k_, grad_v_, local.problem.q_heads(), local.problem.groups},
        stream_);
  }
  if (in_place) window_ = ranks_.expose(slot_bytes(0) + slot_bytes(1));
}

// Partials of the largest stage that has the slot.
std::int64_t GradientReturn::slot_bytes(int slot) const {
  const std::int64_t rows = plan_.max_buffer_rows(slot);
  return copies(plan_.group()) *
         round_up(kv_bytes(partial_shape(grad_k_, rows), partial_shape(grad_v_, rows), DType::f32));
}

std::int64_t GradientReturn::copies(int group) const {
  if (!tree_) return 1;
  const auto found = copies_.find(group);
  if (found != copies_.end()) return found->second;
  const auto count = static_cast<std::int64_t>(plan_.gradient_nodes(group).size());
  return copies_.emplace(group, count).first->second;
}

Shape GradientReturn::partial_shape(const TensorView& own, std::int64_t rows) const {
  return {own.shape[0], rows, heads_, own.shape[3]};
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

void GradientReturn::prepare(const Stage& stage) {
  if (stage.number == 0) return;
  Slot& slot = slot_of(stage);
  if (slot.release != nullptr) slot.release->wait();
  slot.release.reset();
  slot.views.clear();
  if (stage.buffer_rows == 0) return;
  const Shape k = partial_shape(grad_k_, stage.buffer_rows);
  const Shape v = partial_shape(grad_v_, stage.buffer_rows);
  const std::int64_t bytes = round_up(kv_bytes(k, v, DType::f32));
  const std::int64_t count = copies(plan_.group());
  auto* memory = static_cast<std::byte*>(outgoing_memory(stage));
  if (count > 0) fill_bytes(memory, grad_k_.device, 0, count * bytes, stream_);
  for (std::int64_t i = 0; i < count; ++i) {
    slot.views.push_back(kv_views(memory + i * bytes, k, v, DType::f32, grad_k_.device));
  }
}

std::span<const KvViews> GradientReturn::partials(const Stage& stage) const {
  if (stage.number == 0) return {&own_, 1};
  return slot_of(stage).views;
}

template <typename Visit>
void GradientReturn::for_each_outgoing(const Transfer& transfer, const Slot& slot,
                                       Visit visit) const {
  for (const Piece& piece : transfer.pieces) {
    const Span held{piece.buffer_begin, piece.buffer_begin + piece.rows.size()};
    const Span batch = batch_rows(piece, grad_k_.shape[0]);
    for (std::int64_t b = batch.begin; b < batch.end; ++b) {
      for (const KvViews& partial : slot.views) {
        for (const TensorView& view : {partial.k, partial.v}) visit(rows_of(view, b, held));
      }
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
        for (std::int64_t i = 0; i < 2 * copies(transfer.peer); ++i) {
          const KvSide side = i % 2 == 0 ? KvSide::key : KvSide::value;
          const TensorView& own = side == KvSide::key ? grad_k_ : grad_v_;
          const Shape shape{1, piece.rows.size(), heads_, own.shape[3]};
          const void* from = next;
          if (in_place) {
            from = static_cast<const std::byte*>(window_->peer(transfer.peer)) + *place++;
          } else {
            next += shape.elements();
          }
          visit(Arrival{transfer.peer, static_cast<std::size_t>(i / 2), b, piece.rows, side,
                        TensorView(const_cast<void*>(from), DType::f32, shape, own.device)});
        }
      }
    }
  }
}

std::int64_t GradientReturn::incoming_bytes(const Stage& stage) const {
  std::int64_t rows = 0;
  for (const Transfer& transfer : stage.sends) {
    if (!readable(transfer.peer)) {
      rows += copies(transfer.peer) * transfer.rows(grad_k_.shape[0]);
    }
  }
  return kFloatBytes * rows * heads_ * (grad_k_.shape[3] + grad_v_.shape[3]);
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
    places.resize(static_cast<std::size_t>(2 * copies(transfer.peer) * pieces_of(transfer, batch)));
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
  for_each_incoming(stage, slot, [&](const Arrival& arrival) {
    if (readable(arrival.peer)) return;
    const TensorView& part = arrival.part;
    receives.push_back({arrival.peer, part.data, part.shape.elements() * kFloatBytes});
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
  for_each_incoming(stage, slot, [&](const Arrival& arrival) {
    take(arrival);
    const bool read = arrival.peer != ranks_.rank() && readable(arrival.peer);
    read_bytes_ += read ? arrival.part.shape.elements() * kFloatBytes : 0;
  });
  release_peers(stage, slot);
}

void GradientReturn::take(const Arrival& arrival) {
  const Span batch{arrival.batch, arrival.batch + 1};
  if (tree_) {
    return tree_->add(arrival.peer, arrival.node, arrival.batch, arrival.rows, arrival.side,
                      arrival.part);
  }
  const TensorView& own = arrival.side == KvSide::key ? grad_k_ : grad_v_;
  accumulate(arrival.part, own.slice(0, batch).slice(1, arrival.rows), stream_);
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
  std::int64_t bytes = tree_ ? tree_->buffer_bytes() : 0;
  for (const Slot& slot : slots_) {
    bytes += slot.shared_bytes + slot.outgoing.bytes() + slot.incoming.bytes();
  }
  return bytes;
}

}  // namespace annulus
