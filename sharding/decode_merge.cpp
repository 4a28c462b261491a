#include "sharding/decode_merge.hpp"

#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/error.hpp"
#include "sharding/named_sharding.hpp"

namespace annulus {
namespace {

// A state of some heads as it travels: rows of O, then the maxima and the sums.
AttentionState state_in(const Buffer& buffer, std::int64_t tokens, std::int64_t heads,
                        std::int64_t dim) {
  auto* data = static_cast<float*>(buffer.data());
  const Device device = buffer.device();
  const Shape statistics{1, heads, tokens};
  float* max = data + tokens * heads * dim;
  return {TensorView(data, DType::f32, Shape{1, tokens, heads, dim}, device),
          TensorView(max, DType::f32, statistics, device),
          TensorView(max + tokens * heads, DType::f32, statistics, device)};
}

std::int64_t state_bytes(std::int64_t tokens, std::int64_t heads, std::int64_t dim) {
  return tokens * heads * (dim + 2) * 4;
}

AttentionState heads_of(const AttentionState& state, Span heads) {
  return {state.accumulator.slice(2, heads), state.row_max.slice(1, heads),
          state.row_sum.slice(1, heads)};
}

void copy_state(const AttentionState& from, const AttentionState& to, Stream stream) {
  copy(from.accumulator, to.accumulator, stream);
  copy(from.row_max, to.row_max, stream);
  copy(from.row_sum, to.row_sum, stream);
}

// [tokens, heads, dim] or [heads, tokens], contiguous in `data`, as batch rows of finish().
TensorView batch_of_one(TensorView view) {
  Shape shape{1, view.shape[0], view.shape[1]};
  Shape strides{0, view.strides[0], view.strides[1]};
  if (view.rank() == 3) {
    shape = Shape{1, view.shape[0], view.shape[1], view.shape[2]};
    strides = Shape{0, view.strides[0], view.strides[1], view.strides[2]};
  }
  return {view.data, view.dtype, shape, strides, view.device};
}

class Merge {
 public:
  Merge(Communicator& ranks, const AttentionState& partial, Stream stream)
      : ranks_(ranks),
        partial_(partial),
        stream_(stream),
        tokens_(partial.accumulator.shape[1]),
        heads_(partial.accumulator.shape[2]),
        dim_(partial.accumulator.shape[3]),
        device_(partial.accumulator.device) {}

  Span share(int rank) const { return split_evenly(heads_, ranks_.size(), rank); }

  /// Finishes this rank's heads; views are of those alone.
  void merge_own(const TensorView& o, const TensorView& log_sum_exp) {
    const std::int64_t own = share(ranks_.rank()).size();
    std::vector<Buffer> sent;
    std::vector<Buffer> received;
    std::vector<Send> sends;
    std::vector<Receive> receives;
    for (int peer = 0; peer < ranks_.size(); ++peer) {
      const Span theirs = share(peer);
      received.emplace_back(device_, state_bytes(tokens_, own, dim_), stream_);
      sent.emplace_back(device_, state_bytes(tokens_, theirs.size(), dim_), stream_);
      if (!theirs.empty() && tokens_ > 0) {
        copy_state(heads_of(partial_, theirs),
                   state_in(peer == ranks_.rank() ? received.back() : sent.back(), tokens_,
                            theirs.size(), dim_),
                   stream_);
      }
      if (peer == ranks_.rank()) continue;
      sends.push_back({peer, sent.back().data(), sent.back().bytes()});
      receives.push_back({peer, received.back().data(), received.back().bytes()});
    }
    ranks_.exchange(sends, receives, stream_)->wait(stream_);
    if (own == 0 || tokens_ == 0) return;
    const AttentionState total = state_in(received.front(), tokens_, own, dim_);
    for (std::size_t rank = 1; rank < received.size(); ++rank) {
      merge(state_in(received[rank], tokens_, own, dim_), total, stream_);
    }
    finish(total, batch_of_one(o), log_sum_exp ? batch_of_one(log_sum_exp) : TensorView{}, stream_);
    synchronize(device_, stream_);
  }

  void everywhere(const TensorView& o, const TensorView& log_sum_exp) {
    // A rank's finished heads: O in its dtype, then log-sum-exp.
    const std::int64_t o_size = size_bytes(o.dtype);
    std::vector<Buffer> finished;
    for (int rank = 0; rank < ranks_.size(); ++rank) {
      const std::int64_t rows = tokens_ * share(rank).size();
      finished.emplace_back(device_, rows * (dim_ * o_size + (log_sum_exp ? 4 : 0)), stream_);
    }
    const auto views = [&](int rank) {
      const Buffer& buffer = finished[static_cast<std::size_t>(rank)];
      const std::int64_t heads = share(rank).size();
      auto* data = static_cast<std::byte*>(buffer.data());
      TensorView lse;
      if (log_sum_exp) {
        lse = {data + tokens_ * heads * dim_ * o_size, DType::f32, Shape{heads, tokens_}, device_};
      }
      return std::pair(TensorView(data, o.dtype, Shape{tokens_, heads, dim_}, device_), lse);
    };
    const Buffer& own = finished[static_cast<std::size_t>(ranks_.rank())];
    merge_own(views(ranks_.rank()).first, views(ranks_.rank()).second);
    std::vector<Send> sends;
    std::vector<Receive> receives;
    for (int peer = 0; peer < ranks_.size(); ++peer) {
      if (peer == ranks_.rank()) continue;
      const Buffer& theirs = finished[static_cast<std::size_t>(peer)];
      sends.push_back({peer, own.data(), own.bytes()});
      receives.push_back({peer, theirs.data(), theirs.bytes()});
    }
    ranks_.exchange(sends, receives, stream_)->wait(stream_);
    for (int rank = 0; rank < ranks_.size(); ++rank) {
      if (share(rank).empty() || tokens_ == 0) continue;
      copy(views(rank).first, o.slice(1, share(rank)), stream_);
      if (log_sum_exp) copy(views(rank).second, log_sum_exp.slice(0, share(rank)), stream_);
    }
    synchronize(device_, stream_);
  }

 private:
  Communicator& ranks_;
  const AttentionState& partial_;
  Stream stream_;
  std::int64_t tokens_;
  std::int64_t heads_;
  std::int64_t dim_;
  Device device_;
};

}  // namespace

void merge_over_ranks(Communicator& ranks, const AttentionState& partial, const TensorView& o,
                      const TensorView& log_sum_exp, MergedHeads heads, Stream stream) {
  Merge merge(ranks, partial, stream);
  const Shape& rows = partial.accumulator.shape;
  const std::int64_t wanted =
      heads == MergedHeads::everywhere ? rows[2] : merge.share(ranks.rank()).size();
  require((o.shape == Shape{rows[1], wanted, rows[3]}), ExitCode::internal,
          "decode: output {} for {} tokens, {} heads of {} columns", o.shape.to_string(), rows[1],
          wanted, rows[3]);
  if (heads == MergedHeads::everywhere && ranks.size() > 1) {
    merge.everywhere(o, log_sum_exp);
  } else {
    merge.merge_own(o, log_sum_exp);
  }
}

std::int64_t merge_bytes(const MergeShape& shape, int ranks, int rank, MergedHeads heads) {
  const std::int64_t own = split_evenly(shape.q_heads, ranks, rank).size();
  const std::int64_t partials = state_bytes(shape.tokens, shape.q_heads - own, shape.value_dim);
  if (heads == MergedHeads::split) return partials;
  const std::int64_t row =
      shape.value_dim * size_bytes(shape.output_dtype) + (shape.log_sum_exp ? 4 : 0);
  return partials + (ranks - 1) * shape.tokens * own * row;
}

}  // namespace annulus
