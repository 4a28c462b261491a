#include "runtime/attention_inputs.hpp"

#include <string_view>

#include "kernels/error.hpp"

namespace annulus {
namespace {

/// A bias or dense mask over all pairs.
Shape pair_shape(const DistributedTensor* tensor, const AttentionShape& shape,
                 std::string_view what) {
  if (tensor == nullptr || !*tensor) return {};
  const Shape& found = tensor->global_shape();
  const bool fits = found.rank() == 4 && (found[0] == shape.batch || found[0] == 1) &&
                    (found[1] == shape.q_heads || found[1] == shape.kv_heads || found[1] == 1) &&
                    found[2] == shape.seq_q && found[3] == shape.seq_kv;
  require(fits, ExitCode::bad_data, "attention: {} is {}, expected [{} or 1, {}, {} or 1, {}, {}]",
          what, found.to_string(), shape.batch, shape.q_heads, shape.kv_heads, shape.seq_q,
          shape.seq_kv);
  return found;
}

Shape sinks_shape(const DistributedTensor* tensor, const AttentionShape& shape) {
  if (tensor == nullptr || !*tensor) return {};
  const Shape& found = tensor->global_shape();
  const bool fits = (found.rank() == 1 && found[0] == shape.q_heads) ||
                    (found.rank() == 2 && found[0] == 1 && found[1] == shape.q_heads);
  require(fits, ExitCode::bad_data, "attention: sinks are {}, expected [{}]", found.to_string(),
          shape.q_heads);
  return found;
}

}  // namespace

Shape bthd_shape(const DistributedTensor& tensor, DimOrder order, std::string_view what) {
  require(static_cast<bool>(tensor), ExitCode::usage, "attention: {} is absent", what);
  const Shape& shape = tensor.global_shape();
  const int rank = order == DimOrder::thd ? 3 : 4;
  require(shape.rank() == rank, ExitCode::bad_data,
          "attention: {} {} has not the {} dimensions of {}", what, shape.to_string(), rank,
          name(order));
  switch (order) {
    case DimOrder::thd:
      return {1, shape[0], shape[1], shape[2]};
    case DimOrder::bhtd:
      return {shape[0], shape[2], shape[1], shape[3]};
    case DimOrder::bthd:
      break;
  }
  return shape;
}

void check_tensor(const DistributedTensor* tensor, std::string_view what, const Mesh& mesh,
                  bool flags) {
  if (tensor == nullptr || !*tensor) return;
  require(flags ? tensor->dtype() == DType::u8 : is_floating(tensor->dtype()), ExitCode::bad_data,
          "attention: {} is of {}; accepted: {}", what, name(tensor->dtype()),
          flags ? "u8, 1 keeps" : "f32, f16, bf16, f64");
  const Mesh& found = tensor->layout().mesh();
  require(found == mesh, ExitCode::usage, "attention: {} lies over mesh {}, the operation over {}",
          what, found.to_string(), mesh.to_string());
}

void check_output_dtype(const AttentionOptions& options) {
  const DType dtype = options.output_dtype.value_or(DType::f32);
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, ExitCode::usage,
          "attention: output dtype {}; accepted: f32, f16, bf16", name(dtype));
}

void check_tensors(const AttentionInputs& inputs, const Mesh& mesh) {
  check_tensor(&inputs.query, "query", mesh);
  check_tensor(&inputs.key, "key", mesh);
  check_tensor(&inputs.value, "value", mesh);
  check_tensor(inputs.bias, "bias", mesh);
  check_tensor(inputs.mask, "mask", mesh, true);
  check_tensor(inputs.sinks, "sinks", mesh);
  check_tensor(inputs.decode.query_rope, "query_rope", mesh);
  check_tensor(inputs.decode.key_rope, "key_rope", mesh);
}

AttentionShape shape_of(const AttentionInputs& inputs, DimOrder order) {
  const Shape q = bthd_shape(inputs.query, order, "query");
  const Shape k = bthd_shape(inputs.key, order, "key");
  const Shape v = bthd_shape(inputs.value, order, "value");
  require(k[0] == q[0] && v[0] == q[0], ExitCode::bad_data,
          "attention: batch sizes differ: query {}, key {}, value {}", q[0], k[0], v[0]);
  require(v[1] == k[1] && v[2] == k[2], ExitCode::bad_data,
          "attention: value {} has not the rows and heads of key {}", v.to_string(), k.to_string());
  require(k[3] == q[3], ExitCode::bad_data, "attention: head_dim differs: query {}, key {}", q[3],
          k[3]);
  require(q[2] > 0 && k[2] > 0 && q[2] % k[2] == 0, ExitCode::bad_data,
          "attention: {} query heads do not group over {} KV heads; the KV heads must divide the "
          "query heads",
          q[2], k[2]);
  require(q[3] > 0 && v[3] > 0, ExitCode::bad_data, "attention: query {} and value {} need a width",
          q.to_string(), v.to_string());
  AttentionShape shape{q[0], q[1], k[1], q[2], k[2], q[3], v[3]};
  shape.bias = pair_shape(inputs.bias, shape, "bias");
  shape.mask = pair_shape(inputs.mask, shape, "mask");
  shape.sinks = sinks_shape(inputs.sinks, shape);
  return shape;
}

}  // namespace annulus
