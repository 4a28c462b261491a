#include "runtime/redistribute.hpp"

#include <memory>
#include <utility>
#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/error.hpp"
#include "sharding/redistribution.hpp"

namespace annulus {
namespace {

using Segments = std::vector<std::vector<Segment1d>>;

/// Calls `apply` with both sides' view of each piece of the product of the segments.
template <typename Apply>
void for_each_piece(const ConstTensorView& from, const TensorView& to, const Segments& segments,
                    const Apply& apply, int dim = 0) {
  if (dim == from.rank()) return apply(from, to);
  for (const Segment1d& part : segments[static_cast<std::size_t>(dim)]) {
    for_each_piece(from.slice(dim, {part.from, part.from + part.size}),
                   to.slice(dim, {part.to, part.to + part.size}), segments, apply, dim + 1);
  }
}

void copy_pieces(const ConstTensorView& from, const TensorView& to, const Segments& segments,
                 Stream stream) {
  for_each_piece(from, to, segments,
                 [&](const ConstTensorView& a, const TensorView& b) { copy(a, b, stream); });
}

/// The segments with one side replaced by places in a message, where they lie end to end.
Segments packed(Segments segments, std::int64_t Segment1d::*side) {
  for (std::vector<Segment1d>& list : segments) {
    std::int64_t at = 0;
    for (Segment1d& segment : list) {
      segment.*side = at;
      at += segment.size;
    }
  }
  return segments;
}

/// The part of a shard that makes up a message, when it is one piece of memory; else absent.
template <typename View>
View in_place(View shard, const ShardTransfer& transfer, std::int64_t Segment1d::*side) {
  for (int dim = 0; dim < shard.rank(); ++dim) {
    const std::vector<Segment1d>& list = transfer.segments[static_cast<std::size_t>(dim)];
    if (list.size() != 1) return {};
    const Segment1d& only = list.front();
    shard = shard.slice(dim, {only.*side, only.*side + only.size});
  }
  return shard.is_contiguous() ? shard : View{};
}

/// Where messages lie, and in which order work on them runs.
struct Place {
  Device device = Device::cpu;
  Stream stream;
  bool beside = false;  // never in a shard
};

/// A message to or from another rank: a part of the shard itself, or memory beside it where the
/// communicator wants it.
template <typename View>
struct Message {
  const ShardTransfer* transfer = nullptr;
  View view;
  Tensor beside;

  Message(const View& shard, const ShardTransfer& what, std::int64_t Segment1d::*side,
          const Place& place)
      : transfer(&what) {
    if (shard.device == place.device && !place.beside) view = in_place(shard, what, side);
    if (view) return;
    beside = Tensor(shard.dtype, what.message_shape(), place.device, place.stream);
    view = beside.view();
  }

  std::int64_t bytes() const { return view.shape.elements() * size_bytes(view.dtype); }
};

std::vector<Message<ConstTensorView>> pack(const ConstTensorView& shard,
                                           const std::vector<ShardTransfer>& transfers, int rank,
                                           const Place& place) {
  std::vector<Message<ConstTensorView>> messages;
  for (const ShardTransfer& send : transfers) {
    if (send.peer == rank) continue;
    auto& message = messages.emplace_back(shard, send, &Segment1d::from, place);
    if (!message.beside) continue;
    copy_pieces(shard, message.beside.view(), packed(send.segments, &Segment1d::to), place.stream);
  }
  // A host communicator reads at once what a device wrote.
  if (shard.device != place.device) synchronize(shard.device, place.stream);
  return messages;
}

std::vector<Message<TensorView>> expect(const TensorView& shard,
                                        const std::vector<ShardTransfer>& transfers, int rank,
                                        const Place& place) {
  std::vector<Message<TensorView>> messages;
  for (const ShardTransfer& receive : transfers) {
    if (receive.peer != rank) messages.emplace_back(shard, receive, &Segment1d::to, place);
  }
  return messages;
}

std::unique_ptr<Exchange> start(const std::vector<Message<ConstTensorView>>& outgoing,
                                const std::vector<Message<TensorView>>& incoming,
                                Communicator& ranks, Stream stream) {
  std::vector<Send> sends;
  for (const auto& message : outgoing) {
    sends.push_back({message.transfer->peer, message.view.data, message.bytes()});
  }
  std::vector<Receive> receives;
  for (const auto& message : incoming) {
    receives.push_back({message.transfer->peer, message.view.data, message.bytes()});
  }
  return ranks.exchange(sends, receives, stream);
}

void unpack(const std::vector<Message<TensorView>>& messages, const TensorView& shard,
            const Place& place) {
  for (const Message<TensorView>& message : messages) {
    if (!message.beside) continue;
    copy_pieces(message.view, shard, packed(message.transfer->segments, &Segment1d::from),
                place.stream);
  }
  // Host messages go away before the device has read them.
  if (shard.device != place.device) synchronize(shard.device, place.stream);
}

/// shard = the messages of lower ranks + the shard + the messages of higher ranks.
void add_in_rank_order(const std::vector<Message<TensorView>>& messages, int rank,
                       const TensorView& shard, const Place& place) {
  Tensor total(shard.dtype, shard.shape, shard.device, place.stream);
  fill_bytes(total.view().data, shard.device, 0, shard.shape.elements() * size_bytes(shard.dtype),
             place.stream);
  const auto add = [&](const Message<TensorView>& message) {
    Tensor near = message.view.device == shard.device
                      ? Tensor::borrow(message.view)
                      : Tensor::copy_of(message.view, shard.dtype, shard.device, place.stream);
    for_each_piece(near.view(), total.view(), packed(message.transfer->segments, &Segment1d::from),
                   [&](const ConstTensorView& from, const TensorView& into) {
                     accumulate(from, into, place.stream);
                   });
  };
  for (const auto& message : messages) {
    if (message.transfer->peer < rank) add(message);
  }
  accumulate(shard, total.view(), place.stream);
  for (const auto& message : messages) {
    if (message.transfer->peer > rank) add(message);
  }
  copy(std::as_const(total).view(), shard, place.stream);
}

void check(const DistributedTensor& from, const DistributedTensor& to, const Communicator& ranks) {
  require(from && to && from.dtype() == to.dtype() && from.device() == to.device(), ExitCode::usage,
          "redistribute: needs two tensors of one dtype on one device");
  require(ranks.size() == from.layout().mesh().ranks() && ranks.rank() == from.rank() &&
              ranks.rank() == to.rank(),
          ExitCode::usage,
          "redistribute: rank {} of {} does not hold the shard of rank {} over {} ranks",
          ranks.rank(), ranks.size(), from.rank(), from.layout().mesh().ranks());
}

}  // namespace

void redistribute_into(const DistributedTensor& from, DistributedTensor& to, Communicator& ranks,
                       Stream stream) {
  check(from, to, ranks);
  const Redistribution plan = plan_redistribution(from.layout(), to.layout(), ranks.rank());
  const Place place{.device = ranks.device(), .stream = stream};
  const auto outgoing = pack(from.local(), plan.sends, ranks.rank(), place);
  const auto incoming = expect(to.local(), plan.receives, ranks.rank(), place);
  const auto exchange = start(outgoing, incoming, ranks, stream);
  for (const ShardTransfer& kept : plan.receives) {
    if (kept.peer != ranks.rank()) continue;
    copy_pieces(from.local(), to.local(), kept.segments, stream);
  }
  exchange->wait(stream);
  unpack(incoming, to.local(), place);
}

DistributedTensor redistribute(const DistributedTensor& from, const TensorLayout& to,
                               Communicator& ranks, Stream stream) {
  require(static_cast<bool>(from), ExitCode::usage, "redistribute: there is no tensor");
  DistributedTensor result(from.dtype(), to, ranks.rank(), from.device(), stream);
  redistribute_into(from, result, ranks, stream);
  return result;
}

Tensor gather(const DistributedTensor& tensor, Communicator& ranks, std::optional<int> root,
              Stream stream) {
  require(static_cast<bool>(tensor), ExitCode::usage, "gather: there is no tensor");
  const Shape& shape = tensor.global_shape();
  const Mesh& mesh = tensor.layout().mesh();
  const TensorLayout whole = root ? TensorLayout::only_on(*root, shape, mesh)
                                  : TensorLayout(shape, NamedSharding(mesh, PartitionSpec()));
  if (root && ranks.rank() != *root) {
    redistribute(tensor, whole, ranks, stream);
    return {};
  }
  Tensor result(tensor.dtype(), shape, tensor.device(), stream);
  DistributedTensor into(Tensor::borrow(result.view()), whole, ranks.rank());
  redistribute_into(tensor, into, ranks, stream);
  return result;
}

void sum_shared(DistributedTensor& partial, Communicator& ranks, Stream stream) {
  require(partial && partial.dtype() == DType::f32, ExitCode::usage,
          "sum: needs an f32 tensor, found {}", partial ? name(partial.dtype()) : "none");
  check(partial, partial, ranks);
  const Redistribution shared = shared_parts(partial.layout(), ranks.rank());
  if (shared.sends.empty()) return;
  const Place place{.device = ranks.device(), .stream = stream, .beside = true};
  const auto outgoing = pack(std::as_const(partial).local(), shared.sends, ranks.rank(), place);
  const auto incoming = expect(partial.local(), shared.receives, ranks.rank(), place);
  start(outgoing, incoming, ranks, stream)->wait(stream);
  add_in_rank_order(incoming, ranks.rank(), partial.local(), place);
}

}  // namespace annulus
