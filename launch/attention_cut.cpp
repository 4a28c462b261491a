#include "launch/attention_cut.hpp"

#include <cmath>
#include <utility>

#include "runtime/selection.hpp"

namespace annulus::launch {
namespace {

std::vector<PositionRun> positions_of(const std::vector<Span>& spans) {
  std::vector<PositionRun> runs;
  std::int64_t local = 0;
  for (const Span& span : spans) {
    runs.push_back({local, span.begin});
    local += span.size();
  }
  return runs;
}

// What a slice keeps of one range of queries and one of keys, by local indices.
void add_clipped(const Slice& slice, Span queries, Span keys, std::int64_t local_query,
                 std::int64_t local_key, std::vector<Slice>& slices) {
  const Slice kept = clip(slice, queries, keys);
  if (kept.q.empty() || kept.k.empty()) return;
  const std::int64_t q_shift = queries.begin - local_query;
  const std::int64_t k_shift = keys.begin - local_key;
  slices.push_back({{kept.q.begin - q_shift, kept.q.end - q_shift},
                    {kept.k.begin - k_shift, kept.k.end - k_shift},
                    kept.band.shifted(q_shift, k_shift)});
}

std::vector<Slice> slices_of(const MaskSlices& mask, const AttentionCut& cut) {
  std::vector<Slice> slices;
  std::int64_t local_query = 0;
  for (const Span& queries : cut.queries) {
    for (const Slice& slice : mask.view().of_batch(cut.batch)) {
      if (intersect(slice.q, queries).empty()) continue;
      std::int64_t local_key = 0;
      for (const Span& keys : cut.keys) {
        add_clipped(slice, queries, keys, local_query, local_key, slices);
        local_key += keys.size();
      }
    }
    local_query += queries.size();
  }
  return slices;
}

// The cut of [batch|1, heads|1, seq_q, seq_kv].
Selection pair_selection(const Shape& shape, const AttentionCut& cut) {
  const std::int64_t b = shape[0] == 1 ? 0 : cut.batch;
  const std::int64_t h = shape[1] == 1 ? 0 : cut.q_head;
  return Selection(shape)
      .set(0, {{b, b + 1}})
      .set(1, {{h, h + 1}})
      .set(2, cut.queries)
      .set(3, cut.keys);
}

// Rows of one head of [batch, seq, heads, dim].
Selection row_selection(const Shape& shape, std::int64_t batch, std::int64_t head,
                        const std::vector<Span>& rows) {
  return Selection(shape).set(0, {{batch, batch + 1}}).set(1, rows).set(2, {{head, head + 1}});
}

}  // namespace

FieldPart::FieldPart(Communicator& alone, const Checkpoint& checkpoint, CheckpointField field,
                     const Selection& selection, DType rounded, DType held)
    : shape_(selection.shape()),
      held_(held),
      buffer_(Device::cpu, shape_.elements() * size_bytes(rounded)) {
  checkpoint.read(alone, field, selection, {buffer_.data(), rounded, shape_});
  if (rounded == held) return;
  Buffer converted(Device::cpu, shape_.elements() * size_bytes(held));
  copy(ConstTensorView(buffer_.data(), rounded, shape_), {converted.data(), held, shape_});
  buffer_ = std::move(converted);
}

std::vector<Span> single_rows(const std::vector<std::int64_t>& rows) {
  std::vector<Span> spans;
  for (const std::int64_t row : rows) spans.push_back({row, row + 1});
  return spans;
}

CutAttention::CutAttention(Communicator& alone, const Checkpoint& checkpoint,
                           const RunOptions& options, const MaskSlices& mask,
                           const AttentionCut& cut)
    : slices_(slices_of(mask, cut)),
      q_positions_(positions_of(cut.queries)),
      k_positions_(positions_of(cut.keys)) {
  using Field = CheckpointField;
  const std::int64_t groups = checkpoint.shape(Field::query)[2] / checkpoint.shape(Field::key)[2];
  const auto rows = [&](Field field, std::int64_t head, const std::vector<Span>& spans,
                        std::optional<FieldPart>& into) {
    return into
        .emplace(alone, checkpoint, field,
                 row_selection(checkpoint.shape(field), cut.batch, head, spans),
                 options.dtype.value_or(checkpoint.dtype(field)))
        .view();
  };
  problem_.q = rows(Field::query, cut.q_head, cut.queries, q_);
  problem_.k = rows(Field::key, cut.q_head / groups, cut.keys, k_);
  problem_.v = rows(Field::value, cut.q_head / groups, cut.keys, v_);
  if (checkpoint.has(Field::bias)) {
    const Selection pairs = pair_selection(checkpoint.shape(Field::bias), cut);
    const DType dtype = checkpoint.dtype(Field::bias);
    problem_.bias = bias_.emplace(alone, checkpoint, Field::bias, pairs, dtype).view();
  }
  if (checkpoint.has(Field::mask)) {
    const Selection pairs = pair_selection(checkpoint.shape(Field::mask), cut);
    problem_.dense_mask =
        mask_.emplace(alone, checkpoint, Field::mask, pairs, DType::u8, DType::u8).view();
  }
  if (checkpoint.has(Field::sinks)) {
    const Selection one =
        Selection(checkpoint.shape(Field::sinks)).set(0, {{cut.q_head, cut.q_head + 1}});
    problem_.sinks = sinks_.emplace(alone, checkpoint, Field::sinks, one, DType::f32).view();
  }
  problem_.mask = {slices_, {}};
  problem_.scale =
      options.scale.value_or(1.0F / std::sqrt(static_cast<float>(problem_.head_dim())));
  problem_.soft_cap = options.soft_cap;
  problem_.dropout = {options.dropout, options.seed, cut.batch,
                      cut.q_head,      q_positions_, k_positions_};
}

}  // namespace annulus::launch
