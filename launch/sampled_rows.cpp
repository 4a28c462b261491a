#include "launch/sampled_rows.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>

#include "kernels/attention_reference.hpp"
#include "kernels/buffer.hpp"
#include "runtime/selection.hpp"

namespace annulus::launch {
namespace {

constexpr std::size_t kMaxPairs = 64;

std::vector<std::int64_t> sample_indices(std::int64_t size, std::int64_t count,
                                         std::mt19937_64& random) {
  std::vector<std::int64_t> indices(static_cast<std::size_t>(size));
  std::iota(indices.begin(), indices.end(), std::int64_t{0});
  if (count >= size) return indices;
  std::vector<std::int64_t> sampled = {0, size - 1};
  std::uniform_int_distribution<std::int64_t> any(0, size - 1);
  while (static_cast<std::int64_t>(sampled.size()) < count) sampled.push_back(any(random));
  std::sort(sampled.begin(), sampled.end());
  sampled.erase(std::unique(sampled.begin(), sampled.end()), sampled.end());
  return sampled;
}

// A part of a field in host memory.
class FieldPart {
 public:
  FieldPart(Communicator& alone, const Checkpoint& checkpoint, CheckpointField field,
            const Selection& selection, DType dtype)
      : shape_(selection.shape()),
        dtype_(dtype),
        buffer_(Device::cpu, shape_.elements() * size_bytes(dtype)) {
    checkpoint.read(alone, field, selection, mutable_view());
  }
  ConstTensorView view() const { return mutable_view(); }
  /// The same numbers in double.
  FieldPart in_double() const {
    FieldPart part(shape_, DType::f64);
    copy(view(), part.mutable_view());
    return part;
  }

 private:
  FieldPart(const Shape& shape, DType dtype)
      : shape_(shape), dtype_(dtype), buffer_(Device::cpu, shape.elements() * size_bytes(dtype)) {}
  TensorView mutable_view() const { return {buffer_.data(), dtype_, shape_}; }

  Shape shape_;
  DType dtype_;
  Buffer buffer_;
};

std::vector<Span> single_rows(const std::vector<std::int64_t>& rows) {
  std::vector<Span> spans;
  for (const std::int64_t row : rows) spans.push_back({row, row + 1});
  return spans;
}

// Slices of the sampled rows, numbered from 0: each a plain range of keys.
std::vector<Slice> slices_of(const MaskSlices& mask, const RowSample& sample) {
  std::vector<Slice> slices;
  std::int64_t local = 0;
  for (const std::int64_t row : sample.rows) {
    for (const Slice& slice : mask.view().of_batch(sample.batch)) {
      if (!slice.q.contains(row)) continue;
      const Span keys = intersect(slice.k, slice.band.keys_of(row));
      if (!keys.empty()) slices.push_back({{local, local + 1}, keys, Band{}});
    }
    ++local;
  }
  return slices;
}

std::vector<PositionRun> positions_of(const RowSample& sample) {
  std::vector<PositionRun> runs;
  std::int64_t local = 0;
  for (const std::int64_t row : sample.rows) runs.push_back({local++, row});
  return runs;
}

// The sampled rows of [batch|1, heads|1, seq_q, seq_kv].
Selection pair_selection(const Shape& shape, const RowSample& sample) {
  const std::int64_t b = shape[0] == 1 ? 0 : sample.batch;
  const std::int64_t h = shape[1] == 1 ? 0 : sample.q_head;
  return Selection(shape)
      .set(0, {{b, b + 1}})
      .set(1, {{h, h + 1}})
      .set(2, single_rows(sample.rows));
}

Selection head_selection(const Shape& shape, std::int64_t batch, std::int64_t head) {
  return Selection(shape).set(0, {{batch, batch + 1}}).set(2, {{head, head + 1}});
}

// The tensors that a sample needs, as the computation saw them: rounded to its dtype.
class RowInputs {
 public:
  RowInputs(Communicator& alone, const Checkpoint& checkpoint, const RunOptions& options,
            const RowSample& sample)
      : alone_(alone), checkpoint_(checkpoint) {
    using enum CheckpointField;
    const Shape& queries = checkpoint.shape(query);
    const Shape& keys = checkpoint.shape(key);
    const std::int64_t kv_head = sample.q_head / (queries[2] / keys[2]);
    const auto dtype = [&](CheckpointField field) {
      return options.dtype.value_or(checkpoint.dtype(field));
    };
    q_ =
        read(query, dtype(query),
             head_selection(queries, sample.batch, sample.q_head).set(1, single_rows(sample.rows)));
    k_ = read(key, dtype(key), head_selection(keys, sample.batch, kv_head));
    v_ = read(value, dtype(value), head_selection(checkpoint.shape(value), sample.batch, kv_head));
    if (checkpoint.has(bias)) {
      bias_ = read(bias, checkpoint.dtype(bias), pair_selection(checkpoint.shape(bias), sample));
    }
    if (checkpoint.has(sinks)) {
      sinks_ =
          read(sinks, DType::f32,
               Selection(checkpoint.shape(sinks)).set(0, {{sample.q_head, sample.q_head + 1}}));
    }
    if (checkpoint.has(mask)) {
      mask_.emplace(alone, checkpoint, mask, pair_selection(checkpoint.shape(mask), sample),
                    DType::u8);
    }
  }

  AttentionProblem problem() const {
    AttentionProblem problem;
    problem.q = q_->view();
    problem.k = k_->view();
    problem.v = v_->view();
    if (bias_) problem.bias = bias_->view();
    if (sinks_) problem.sinks = sinks_->view();
    if (mask_) problem.dense_mask = mask_->view();
    return problem;
  }

 private:
  FieldPart read(CheckpointField field, DType dtype, const Selection& selection) const {
    return FieldPart(alone_, checkpoint_, field, selection, dtype).in_double();
  }

  Communicator& alone_;
  const Checkpoint& checkpoint_;
  std::optional<FieldPart> q_;
  std::optional<FieldPart> k_;
  std::optional<FieldPart> v_;
  std::optional<FieldPart> bias_;
  std::optional<FieldPart> sinks_;
  std::optional<FieldPart> mask_;
};

}  // namespace

std::vector<RowSample> sample_rows(const Shape& query, std::int64_t seq_kv, std::int64_t value_dim,
                                   double work, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<RowSample> samples;
  for (std::int64_t b = 0; b < query[0]; ++b) {
    for (std::int64_t h = 0; h < query[2]; ++h) samples.push_back({b, h, {}});
  }
  if (samples.size() > kMaxPairs) {
    std::shuffle(samples.begin(), samples.end(), random);
    samples.resize(kMaxPairs);
  }
  const double row_work =
      static_cast<double>(samples.size()) * static_cast<double>(seq_kv * (query[3] + value_dim));
  const auto rows = static_cast<std::int64_t>(std::ceil(work / std::max(row_work, 1.0)));
  for (RowSample& sample : samples) {
    sample.rows = sample_indices(query[1], std::max<std::int64_t>(rows, 2), random);
  }
  return samples;
}

DoubleRows recompute(Communicator& alone, const Checkpoint& checkpoint, const RunOptions& options,
                     const MaskSlices& mask, const RowSample& sample) {
  const RowInputs inputs(alone, checkpoint, options, sample);
  const std::vector<Slice> slices = slices_of(mask, sample);
  const std::vector<PositionRun> positions = positions_of(sample);
  ForwardCall call;
  call.problem = inputs.problem();
  call.problem.mask = {slices, {}};
  call.problem.scale =
      options.scale.value_or(1.0F / std::sqrt(static_cast<float>(call.problem.head_dim())));
  call.problem.soft_cap = options.soft_cap;
  call.problem.dropout = {options.dropout, options.seed, sample.batch,
                          sample.q_head,   positions,    {}};

  const auto rows = static_cast<std::int64_t>(sample.rows.size());
  const std::int64_t value_dim = call.problem.value_dim();
  DoubleRows result;
  result.outputs.resize(static_cast<std::size_t>(rows * value_dim));
  result.log_sum_exp.resize(static_cast<std::size_t>(rows));
  call.o = {result.outputs.data(), DType::f64, Shape{1, rows, 1, value_dim}};
  call.log_sum_exp = {result.log_sum_exp.data(), DType::f64, Shape{1, 1, rows}};
  kernels::reference::forward(call);
  return result;
}

}  // namespace annulus::launch
