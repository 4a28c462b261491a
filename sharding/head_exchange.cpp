#include "sharding/head_exchange.hpp"

#include <utility>

#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"

namespace annulus {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

std::int64_t bytes_of(const ConstTensorView& view) {
  return view.shape.elements() * size_bytes(view.dtype);
}

std::int64_t aligned(std::int64_t bytes) {
  constexpr std::int64_t kAlignment = 256;
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Contiguous [batch, rows, heads, dim] at `offset` elements into a buffer.
TensorView view_at(const Buffer& buffer, std::int64_t offset, const ConstTensorView& like,
                   std::int64_t rows, std::int64_t heads) {
  auto* data = static_cast<std::byte*>(buffer.data());
  if (data != nullptr) data += offset * size_bytes(like.dtype);
  return {data, like.dtype, {like.shape[0], rows, heads, like.shape[3]}, like.device};
}

// Bytes of all rows of `like` for the heads of every rank but one.
std::int64_t bytes_of_others(const ConstTensorView& like, std::span<const Span> heads_of,
                             int self) {
  std::int64_t heads = 0;
  for (std::size_t rank = 0; rank < heads_of.size(); ++rank) {
    if (rank != index(self)) heads += heads_of[rank].size();
  }
  return heads * like.shape[0] * like.shape[1] * like.shape[3] * size_bytes(like.dtype);
}

TensorView batch_row(const TensorView& view, std::int64_t b) { return view.slice(0, {b, b + 1}); }

}  // namespace

HeadExchange::HeadExchange(Communicator& heads, const AttentionPlan& plan, Stream stream)
    : heads_(heads), plan_(plan), stream_(stream) {
  require(heads.size() == plan.head_ranks() && heads.rank() == plan.head_rank(), ExitCode::internal,
          "{}: rank {} of {} exchanges heads as rank {} of {}", name(plan.scheme()), heads.rank(),
          heads.size(), plan.head_rank(), plan.head_ranks());
}

const SequenceLayout& HeadExchange::rank_layout(Rows rows) const {
  return rows == Rows::queries ? plan_.request().q_layout : plan_.request().kv_layout;
}

const SequenceLayout& HeadExchange::group_layout(Rows rows) const {
  return rows == Rows::queries ? plan_.q_layout() : plan_.kv_layout();
}

Span HeadExchange::group_rows(Rows rows, const RowRun& run) const {
  const std::int64_t begin = group_layout(rows).local_row(run.global.begin);
  return {begin, begin + run.global.size()};
}

TensorView HeadExchange::Bundle::to_heads(Rows rows, const ConstTensorView& local,
                                          std::span<const Span> heads_of) {
  const HeadExchange& exchange = *exchange_;
  const Stream stream = exchange.stream_;
  const int self = exchange.plan_.head_rank();
  const Span own = heads_of[index(self)];
  const std::int64_t batch = local.shape[0];
  const std::int64_t group = exchange.group_layout(rows).rows(exchange.plan_.group());
  memory_.emplace_back(
      local.device, batch * group * own.size() * local.shape[3] * size_bytes(local.dtype), stream);
  const TensorView result = view_at(memory_.back(), 0, local, group, own.size());
  for (int peer = 0; peer < exchange.heads_.size(); ++peer) {
    for (const RowRun& run : exchange.rank_layout(rows).runs(exchange.rank_of(peer))) {
      const TensorView place = result.slice(1, exchange.group_rows(rows, run));
      if (peer == self) {
        stays_.push_back({local.slice(1, run.rows()).slice(2, own), place});
        continue;
      }
      for (std::int64_t b = 0; b < batch; ++b) {
        const TensorView part = batch_row(place, b);
        receives_.push_back({peer, part.data, bytes_of(part)});
      }
    }
    if (peer == self) continue;
    packs_[peer].push_back({rows, local.slice(2, heads_of[index(peer)])});
  }
  return result;
}

// All that goes to a peer lies in one piece.
void HeadExchange::Bundle::pack() {
  const Stream stream = exchange_->stream_;
  std::int64_t bytes = 0;
  for (const auto& [peer, packs] : packs_) {
    for (const Pack& pack : packs) bytes += aligned(bytes_of(pack.from));
  }
  packed_ = Buffer(exchange_->heads_.device(), bytes, stream);
  auto* next = static_cast<std::byte*>(packed_.data());
  for (const auto& [peer, packs] : packs_) {
    bool first = true;
    for (const auto& [rows, from] : packs) {
      const TensorView packed(next, from.dtype, from.shape, from.device);
      next += aligned(bytes_of(from));
      copy(from, packed, stream);
      const int self = exchange_->rank_of(exchange_->plan_.head_rank());
      for (const RowRun& run : exchange_->rank_layout(rows).runs(self)) {
        for (std::int64_t b = 0; b < from.shape[0]; ++b) {
          const TensorView part = batch_row(packed, b).slice(1, run.rows());
          sends_.push_back({peer, part.data, bytes_of(part), !std::exchange(first, false)});
        }
      }
    }
  }
  packs_.clear();
}

void HeadExchange::Bundle::to_rows(Rows rows, const TensorView& theirs,
                                   std::span<const Span> heads_of, const TensorView& local,
                                   bool add) {
  const HeadExchange& exchange = *exchange_;
  const int self = exchange.plan_.head_rank();
  const std::int64_t batch = local.shape[0];
  memory_.emplace_back(local.device, bytes_of_others(local, heads_of, self), exchange.stream_);
  std::int64_t next = 0;
  for (int peer = 0; peer < exchange.heads_.size(); ++peer) {
    const Span heads = heads_of[index(peer)];
    if (peer == self) {
      for (const RowRun& run : exchange.rank_layout(rows).runs(exchange.rank_of(self))) {
        arrivals_.push_back({theirs.slice(1, exchange.group_rows(rows, run)),
                             local.slice(1, run.rows()).slice(2, heads), add});
      }
      continue;
    }
    for (const RowRun& run : exchange.rank_layout(rows).runs(exchange.rank_of(peer))) {
      for (std::int64_t b = 0; b < batch; ++b) {
        const TensorView part = batch_row(theirs, b).slice(1, exchange.group_rows(rows, run));
        sends_.push_back({peer, part.data, bytes_of(part)});
      }
    }
    const TensorView arriving = view_at(memory_.back(), next, local, local.shape[1], heads.size());
    next += arriving.shape.elements();
    arrivals_.push_back({arriving, local.slice(2, heads), add});
    for (const RowRun& run : exchange.rank_layout(rows).runs(exchange.rank_of(self))) {
      for (std::int64_t b = 0; b < batch; ++b) {
        const TensorView part = batch_row(arriving, b).slice(1, run.rows());
        receives_.push_back({peer, part.data, bytes_of(part)});
      }
    }
  }
}

void HeadExchange::Bundle::start() {
  pack();
  const Stream stream = exchange_->stream_;
  under_way_ = exchange_->heads_.exchange(sends_, receives_, stream);
  for (const auto& [from, to] : stays_) copy(from, to, stream);
  stays_.clear();
}

void HeadExchange::Bundle::receive() {
  if (under_way_ == nullptr || exchange_->heads_.device() == Device::cpu) return;
  const Stream side = kernels::cuda::side_stream();
  kernels::cuda::order(exchange_->stream_, side);
  under_way_->wait(side);
}

void HeadExchange::Bundle::wait() {
  if (under_way_ == nullptr) return;
  const Stream stream = exchange_->stream_;
  under_way_->wait(stream);
  under_way_.reset();
  packed_ = Buffer();
  for (const Arrival& arrival : arrivals_) {
    if (arrival.add) {
      accumulate(arrival.from, arrival.into, stream);
    } else {
      copy(arrival.from, arrival.into, stream);
    }
  }
  arrivals_.clear();
}

std::int64_t HeadExchange::Bundle::buffer_bytes() const {
  std::int64_t bytes = packed_.bytes();
  for (const Buffer& buffer : memory_) bytes += buffer.bytes();
  return bytes;
}

}  // namespace annulus
