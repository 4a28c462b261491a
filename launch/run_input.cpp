#include "launch/run_input.hpp"

namespace annulus::launch {
namespace {

const DistributedTensor* pointer(const std::optional<DistributedTensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

// Kernels take biases in f32 and the 16-bit types.
DType bias_dtype(const Checkpoint& checkpoint) {
  const DType stored = checkpoint.dtype(CheckpointField::bias);
  return stored == DType::f64 ? DType::f32 : stored;
}

}  // namespace

AttentionShape attention_shape(const Checkpoint& checkpoint) {
  using enum CheckpointField;
  const Shape& q = checkpoint.shape(query);
  const Shape& k = checkpoint.shape(key);
  AttentionShape shape;
  shape.batch = q[0];
  shape.seq_q = q[1];
  shape.seq_kv = k[1];
  shape.q_heads = q[2];
  shape.kv_heads = k[2];
  shape.head_dim = q[3];
  shape.value_dim = checkpoint.shape(value)[3];
  if (checkpoint.has(bias)) shape.bias = checkpoint.shape(bias);
  if (checkpoint.has(mask)) shape.mask = checkpoint.shape(mask);
  if (checkpoint.has(sinks)) shape.sinks = checkpoint.shape(sinks);
  return shape;
}

Selection selection_of(const TensorLayout& layout, int rank) {
  Selection selection(layout.global_shape());
  for (int dim = 0; dim < layout.global_shape().rank(); ++dim) {
    selection.set(dim, layout.runs(rank, dim));
  }
  return selection;
}

AttentionInputs RunInput::view() const {
  return {query, key, value, pointer(bias), pointer(mask), pointer(sinks)};
}

DistributedTensor read_field(Context& context, const Checkpoint& checkpoint, CheckpointField field,
                             const TensorLayout& layout, DType dtype) {
  DistributedTensor tensor(dtype, layout, context.rank());
  checkpoint.read(context.world(), field, selection_of(layout, context.rank()), tensor.local());
  return tensor;
}

RunInput read_input(Context& context, const Checkpoint& checkpoint, const AttentionLayouts& layouts,
                    DType dtype) {
  using enum CheckpointField;
  const auto read = [&](CheckpointField field, const TensorLayout& layout, DType as) {
    return read_field(context, checkpoint, field, layout, as);
  };
  RunInput input;
  input.query = read(query, layouts.query, dtype);
  input.key = read(key, layouts.key, dtype);
  input.value = read(value, layouts.value, dtype);
  if (layouts.bias) input.bias = read(bias, *layouts.bias, bias_dtype(checkpoint));
  if (layouts.mask) input.mask = read(mask, *layouts.mask, DType::u8);
  if (layouts.sinks) input.sinks = read(sinks, *layouts.sinks, DType::f32);
  return input;
}

}  // namespace annulus::launch
