#include "sharding/head_exchange.hpp"

#include "kernels/error.hpp"

namespace annulus {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

std::int64_t bytes_of(const TensorView& view) {
  return view.shape.elements() * size_bytes(view.dtype);
}

// Contiguous [batch, rows, heads, dim] at `offset` elements into a buffer.
TensorView view_at(const Buffer& buffer, std::int64_t offset, const ConstTensorView& like,
                   std::int64_t rows, std::int64_t heads) {
  auto* data = static_cast<std::byte*>(buffer.data());
  if (data != nullptr) data += offset * size_bytes(like.dtype);
  return {data, like.dtype, {like.shape[0], rows, heads, like.shape[3]}, like.device};
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

std::vector<Span> HeadExchange::q_heads() const {
  std::vector<Span> heads;
  for (int j = 0; j < plan_.head_ranks(); ++j) heads.push_back(plan_.q_heads_of(j));
  return heads;
}

std::vector<Span> HeadExchange::kv_heads() const {
  std::vector<Span> heads;
  for (int j = 0; j < plan_.head_ranks(); ++j) heads.push_back(plan_.kv_heads_of(j));
  return heads;
}

HeadExchange::Pending HeadExchange::to_heads(Rows rows, const ConstTensorView& local,
                                             std::span<const Span> heads_of) {
  const int self = plan_.head_rank();
  const Span own = heads_of[index(self)];
  const std::int64_t batch = local.shape[0];
  const std::int64_t row = batch * local.shape[1] * local.shape[3];  // elements of one head
  const std::int64_t element = size_bytes(local.dtype);
  Pending pending;
  pending.stream_ = stream_;
  const std::int64_t group = group_layout(rows).rows(plan_.group());
  pending.memory_ =
      Buffer(local.device, batch * group * own.size() * local.shape[3] * element, stream_);
  pending.result_ = view_at(pending.memory_, 0, local, group, own.size());

  std::int64_t packed_heads = 0;
  for (int peer = 0; peer < heads_.size(); ++peer) {
    if (peer != self) packed_heads += heads_of[index(peer)].size();
  }
  pending.packed_ = Buffer(local.device, packed_heads * row * element, stream_);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  std::int64_t next = 0;
  for (int peer = 0; peer < heads_.size(); ++peer) {
    for (const RowRun& run : rank_layout(rows).runs(rank_of(peer))) {
      const TensorView place = pending.result_.slice(1, group_rows(rows, run));
      if (peer == self) {
        copy(local.slice(1, run.rows()).slice(2, own), place, stream_);
        continue;
      }
      for (std::int64_t b = 0; b < batch; ++b) {
        const TensorView part = batch_row(place, b);
        receives.push_back({peer, part.data, bytes_of(part)});
      }
    }
    if (peer == self) continue;
    const Span theirs = heads_of[index(peer)];
    const TensorView packed = view_at(pending.packed_, next, local, local.shape[1], theirs.size());
    copy(local.slice(2, theirs), packed, stream_);
    next += packed.shape.elements();
    for (const RowRun& run : rank_layout(rows).runs(rank_of(self))) {
      for (std::int64_t b = 0; b < batch; ++b) {
        const TensorView part = batch_row(packed, b).slice(1, run.rows());
        sends.push_back({peer, part.data, bytes_of(part)});
      }
    }
  }
  pending.exchange_ = heads_.exchange(sends, receives, stream_);
  return pending;
}

HeadExchange::Pending HeadExchange::to_rows(Rows rows, const TensorView& theirs,
                                            std::span<const Span> heads_of, const TensorView& local,
                                            bool add) {
  const int self = plan_.head_rank();
  const std::int64_t batch = local.shape[0];
  const std::int64_t element = size_bytes(local.dtype);
  Pending pending;
  pending.stream_ = stream_;
  pending.add_ = add;
  std::int64_t arriving_heads = 0;
  for (int peer = 0; peer < heads_.size(); ++peer) {
    if (peer != self) arriving_heads += heads_of[index(peer)].size();
  }
  pending.memory_ = Buffer(
      local.device, arriving_heads * batch * local.shape[1] * local.shape[3] * element, stream_);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  std::int64_t next = 0;
  for (int peer = 0; peer < heads_.size(); ++peer) {
    const Span heads = heads_of[index(peer)];
    if (peer == self) {
      for (const RowRun& run : rank_layout(rows).runs(rank_of(self))) {
        pending.arrivals_.push_back(
            {theirs.slice(1, group_rows(rows, run)), local.slice(1, run.rows()).slice(2, heads)});
      }
      continue;
    }
    for (const RowRun& run : rank_layout(rows).runs(rank_of(peer))) {
      for (std::int64_t b = 0; b < batch; ++b) {
        const TensorView part = batch_row(theirs, b).slice(1, group_rows(rows, run));
        sends.push_back({peer, part.data, bytes_of(part)});
      }
    }
    const TensorView arriving = view_at(pending.memory_, next, local, local.shape[1], heads.size());
    next += arriving.shape.elements();
    pending.arrivals_.push_back({arriving, local.slice(2, heads)});
    for (const RowRun& run : rank_layout(rows).runs(rank_of(self))) {
      for (std::int64_t b = 0; b < batch; ++b) {
        const TensorView part = batch_row(arriving, b).slice(1, run.rows());
        receives.push_back({peer, part.data, bytes_of(part)});
      }
    }
  }
  pending.exchange_ = heads_.exchange(sends, receives, stream_);
  return pending;
}

void HeadExchange::Pending::wait() {
  if (exchange_ == nullptr) return;
  exchange_->wait(stream_);
  exchange_.reset();
  packed_ = Buffer();
  for (const Arrival& arrival : arrivals_) {
    if (add_) {
      accumulate(arrival.from, arrival.into, stream_);
    } else {
      copy(arrival.from, arrival.into, stream_);
    }
  }
  arrivals_.clear();
}

void HeadExchange::Pending::progress() {
  if (exchange_ != nullptr) exchange_->test();
}

}  // namespace annulus
