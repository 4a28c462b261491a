#include "tests/runtime/operation_case.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"
#include "runtime/redistribute.hpp"

namespace annulus::testing {
namespace {

Tensor random_tensor(const Shape& shape, std::uint64_t seed) {
  Tensor tensor(DType::f32, shape);
  std::mt19937_64 random(seed);
  auto* values = static_cast<float*>(tensor.view().data);
  for (std::int64_t i = 0, n = shape.elements(); i < n; ++i) {
    // Unit variance.
    const auto unit = static_cast<double>(random() >> 11) * 0x1p-53;
    values[i] = static_cast<float>((unit - 0.5) * std::sqrt(12.0));
  }
  return tensor;
}

Tensor random_mask(const Shape& shape, std::uint64_t seed) {
  Tensor tensor(DType::u8, shape);
  std::mt19937_64 random(seed);
  auto* values = static_cast<std::uint8_t*>(tensor.view().data);
  for (std::int64_t i = 0, n = shape.elements(); i < n; ++i) values[i] = random() % 4 != 0 ? 1 : 0;
  return tensor;
}

Tensor filled(DType dtype, const Shape& shape, int byte) {
  Tensor tensor(dtype, shape);
  fill_bytes(tensor.view().data, Device::cpu, byte, shape.elements() * size_bytes(dtype));
  return tensor;
}

/// [batch|1, kv_heads, …] repeated for the query heads.
Tensor by_query_head(const Tensor& pairs, const AttentionShape& shape) {
  const std::int64_t heads = pairs.shape()[1];
  if (heads == 1 || heads == shape.q_heads) return Tensor::copy_of(pairs.view());
  Shape repeated = pairs.shape();
  repeated[1] = shape.q_heads;
  Tensor result(pairs.dtype(), repeated);
  for (std::int64_t h = 0; h < shape.q_heads; ++h) {
    const std::int64_t kv = h / (shape.q_heads / heads);
    copy(pairs.view().slice(1, {kv, kv + 1}), result.view().slice(1, {h, h + 1}));
  }
  return result;
}

/// The case as one problem over whole tensors; owns what the problem refers to.
struct WholeProblem {
  MaskSlices slices;
  Tensor bias, mask;
  AttentionProblem problem;

  WholeProblem(const OperationCase& c, const OperationTensors& t) {
    AttentionMask user_mask = c.options.mask;
    user_mask.causal = c.options.causal.value_or(false);
    slices = make_slices(user_mask, c.shape.batch, c.shape.seq_q, c.shape.seq_kv);
    problem.q = t.query.view();
    problem.k = t.key.view();
    problem.v = t.value.view();
    problem.mask = slices.view();
    problem.scale =
        c.options.scale.value_or(1.0F / std::sqrt(static_cast<float>(c.shape.head_dim)));
    problem.soft_cap = c.options.soft_cap;
    if (t.sinks) problem.sinks = t.sinks.view();
    if (t.bias) bias = by_query_head(t.bias, c.shape);
    if (t.mask) mask = by_query_head(t.mask, c.shape);
    problem.bias = std::as_const(bias).view();
    problem.dense_mask = std::as_const(mask).view();
    problem.dropout.probability = c.options.dropout.value_or(0.0F);
    problem.dropout.seed = c.options.seed;
  }
};

Tensor magnitudes(const Tensor& tensor) {
  Tensor result = Tensor::copy_of(tensor.view());
  auto* values = static_cast<float*>(result.view().data);
  for (std::int64_t i = 0, n = result.shape().elements(); i < n; ++i) {
    values[i] = std::fabs(values[i]);
  }
  return result;
}

/// Copies the product of the runs of dimensions `dim` and up.
void copy_runs(const ConstTensorView& from, const TensorView& to, const TensorLayout& layout,
               int rank, int dim) {
  if (dim == from.rank()) return copy(from, to);
  std::int64_t at = 0;
  for (const Span run : layout.runs(rank, dim)) {
    copy_runs(from.slice(dim, run), to.slice(dim, {at, at + run.size()}), layout, rank, dim + 1);
    at += run.size();
  }
}

/// Inputs of a case on one rank.
struct SpreadInputs {
  DistributedTensor query, key, value, bias, mask, sinks;

  SpreadInputs(const Context& context, const OperationImpl& operation, const Mesh& mesh,
               const OperationCase& c, const OperationTensors& t, Placement placement) {
    const AttentionLayouts layouts = operation.layouts(c.shape, c.options);
    const AttentionShardings specs =
        operation.metadata().partition_manager.get_shardings(Mode::train, DimOrder::bthd);
    const auto put = [&](const Tensor& whole, const TensorLayout& working,
                         const PartitionSpec& spec) {
      const PartitionSpec wanted = placement == Placement::by_spec ? spec : PartitionSpec();
      const TensorLayout plain(whole.shape(), NamedSharding(mesh, wanted));
      return spread(whole, placement == Placement::working ? working : plain, context.rank());
    };
    query = put(t.query, layouts.query, specs.query);
    key = put(t.key, layouts.key, specs.key);
    value = put(t.value, layouts.value, specs.value);
    if (t.bias) bias = put(t.bias, *layouts.bias, specs.bias);
    if (t.mask) mask = put(t.mask, *layouts.mask, specs.mask);
    if (t.sinks) sinks = put(t.sinks, *layouts.sinks, specs.sinks(t.sinks.shape().rank()));
  }
  AttentionInputs inputs() const { return {query, key, value, &bias, &mask, &sinks}; }
};

double norm(const Tensor& tensor) {
  double sum = 0.0;
  const auto* values = static_cast<const float*>(tensor.view().data);
  for (std::int64_t i = 0, n = tensor.shape().elements(); i < n; ++i) {
    sum += static_cast<double>(values[i]) * values[i];
  }
  return std::sqrt(sum);
}

}  // namespace

std::string OperationCase::in_words() const {
  return fmt::format(
      "batch {} seq {}x{} heads {}:{} dim {}x{} causal {} window {},{} segments {} "
      "seed {}",
      shape.batch, shape.seq_q, shape.seq_kv, shape.q_heads, shape.kv_heads, shape.head_dim,
      shape.value_dim, options.causal.value_or(false), options.mask.window_left,
      options.mask.window_right, options.mask.q_segments.size(), seed);
}

OperationTensors random_inputs(const OperationCase& c) {
  const AttentionShape& s = c.shape;
  OperationTensors t;
  t.query = random_tensor({s.batch, s.seq_q, s.q_heads, s.head_dim}, c.seed * 16 + 1);
  t.key = random_tensor({s.batch, s.seq_kv, s.kv_heads, s.head_dim}, c.seed * 16 + 2);
  t.value = random_tensor({s.batch, s.seq_kv, s.kv_heads, s.value_dim}, c.seed * 16 + 3);
  t.grad_output = random_tensor({s.batch, s.seq_q, s.q_heads, s.value_dim}, c.seed * 16 + 4);
  if (s.bias.rank() > 0) t.bias = random_tensor(s.bias, c.seed * 16 + 5);
  if (s.mask.rank() > 0) t.mask = random_mask(s.mask, c.seed * 16 + 6);
  if (s.sinks.rank() > 0) t.sinks = random_tensor(s.sinks, c.seed * 16 + 7);
  return t;
}

void run_reference(const OperationCase& c, OperationTensors& t, bool backward) {
  const AttentionShape& s = c.shape;
  const WholeProblem whole(c, t);
  t.output = filled(DType::f32, {s.batch, s.seq_q, s.q_heads, s.value_dim}, 0xFF);
  t.log_sum_exp = filled(DType::f32, {s.batch, s.q_heads, s.seq_q}, 0xFF);
  ForwardCall call;
  call.problem = whole.problem;
  call.o = t.output.view();
  call.log_sum_exp = t.log_sum_exp.view();
  attention_forward(call, "reference");
  if (!backward) return;
  Tensor delta(DType::f32, t.log_sum_exp.shape());
  attention_delta(std::as_const(t.output).view(), std::as_const(t.grad_output).view(),
                  delta.view());
  t.grad_query = filled(DType::f32, t.query.shape(), 0);
  t.grad_key = filled(DType::f32, t.key.shape(), 0);
  t.grad_value = filled(DType::f32, t.value.shape(), 0);
  Tensor by_head;
  if (t.bias) by_head = filled(DType::f32, whole.bias.shape(), 0);
  BackwardCall back;
  back.problem = whole.problem;
  back.grad_o = std::as_const(t.grad_output).view();
  back.log_sum_exp = std::as_const(t.log_sum_exp).view();
  back.delta = std::as_const(delta).view();
  back.grad_q = t.grad_query.view();
  back.grad_k = t.grad_key.view();
  back.grad_v = t.grad_value.view();
  back.grad_bias = by_head.view();
  attention_backward(back, "reference");
  if (t.bias) {
    t.grad_bias = filled(DType::f32, t.bias.shape(), 0);
    const std::int64_t group = by_head.shape()[1] / t.bias.shape()[1];
    for (std::int64_t h = 0; h < by_head.shape()[1]; ++h) {
      accumulate(std::as_const(by_head).view().slice(1, {h, h + 1}),
                 t.grad_bias.view().slice(1, {h / group, h / group + 1}));
    }
  }
  if (t.sinks) {
    const auto sink_gradient = [&](const Tensor& row_sums) {
      Tensor gradient = filled(DType::f32, t.sinks.shape(), 0);
      attention_sink_gradient(std::as_const(t.sinks).view(), std::as_const(t.log_sum_exp).view(),
                              row_sums.view(), gradient.view());
      return gradient;
    };
    t.grad_sinks = sink_gradient(delta);
    // It is linear in delta, so that |O|·|dO| in delta's place gives the sum of all magnitudes.
    attention_delta(magnitudes(t.output).view(), magnitudes(t.grad_output).view(), delta.view());
    t.sink_magnitudes = norm(sink_gradient(delta));
  }
}

Tensor shard_of(const Tensor& whole, const TensorLayout& layout, int rank) {
  Tensor shard(whole.dtype(), layout.local_shape(rank));
  copy_runs(whole.view(), shard.view(), layout, rank, 0);
  return shard;
}

DistributedTensor spread(const Tensor& whole, const TensorLayout& layout, int rank) {
  return {shard_of(whole, layout, rank), layout, rank};
}

double max_difference(const Tensor& a, const Tensor& b) {
  if (a.shape() != b.shape()) return std::numeric_limits<double>::infinity();
  const auto* x = static_cast<const float*>(a.view().data);
  const auto* y = static_cast<const float*>(b.view().data);
  double largest = 0.0;
  for (std::int64_t i = 0, n = a.shape().elements(); i < n; ++i) {
    if (x[i] == y[i]) continue;
    const double difference = std::fabs(static_cast<double>(x[i]) - static_cast<double>(y[i]));
    if (!(difference <= largest)) largest = difference;
    if (std::isnan(largest)) return std::numeric_limits<double>::infinity();
  }
  return largest;
}

namespace {

std::unique_ptr<OperationImpl> make(Context& context, const std::string& name, const Mesh& mesh,
                                    OperationConfig config = on_the_host()) {
  config.mesh = mesh;
  return OperationRegistry::create(name, resolve_metadata(context, config));
}

std::string where(const std::string& operation, const Mesh& mesh, const OperationCase& c) {
  return fmt::format("{} on {}: {}", operation, mesh.to_string(), c.in_words());
}

void expect_close(const Tensor& found, const Tensor& expected, double tolerance,
                  const std::string& what) {
  EXPECT_LE(max_difference(found, expected), tolerance) << what;
}

/// `magnitudes`: norm of the sums of the terms' magnitudes, where the terms of a gradient can
/// cancel.
void expect_near_in_norm(const DistributedTensor& found, const Tensor& expected, Context& context,
                         double tolerance, const std::string& what, double magnitudes = 0.0) {
  if (!found) return;
  const Tensor whole = annulus::gather(found, context.world(), 0);
  if (context.rank() != 0) return;
  ASSERT_EQ(whole.shape(), expected.shape()) << what;
  Tensor difference = Tensor::copy_of(std::as_const(expected).view());
  auto* d = static_cast<float*>(difference.view().data);
  const auto* x = static_cast<const float*>(whole.view().data);
  for (std::int64_t i = 0, n = whole.shape().elements(); i < n; ++i) d[i] -= x[i];
  EXPECT_LE(norm(difference), tolerance * std::max({norm(expected), magnitudes, 1e-3})) << what;
}

}  // namespace

void expect_forward(Context& context, const std::string& operation, const Mesh& mesh,
                    const OperationCase& c, const OperationTensors& tensors, double tolerance,
                    Placement placement, const OperationConfig& config) {
  const auto op = make(context, operation, mesh, config);
  const SpreadInputs spread(context, *op, mesh, c, tensors, placement);
  const OperationOutput output = (*op)(spread.inputs(), c.options);
  const GatheredOutput whole = output.gather(context, 0);
  if (context.rank() != 0) return;
  const std::string what = where(operation, mesh, c);
  const Tensor o = Tensor::copy_of(whole.attention_outputs.view(), DType::f32);
  expect_close(o, tensors.output, tolerance, what);
  expect_close(whole.log_sum_exp, tensors.log_sum_exp, tolerance, what + ", log_sum_exp");
}

WholeResults run_both_passes(Context& context, const std::string& operation, const Mesh& mesh,
                             const OperationCase& c, const OperationTensors& tensors,
                             const OperationConfig& config) {
  const auto op = make(context, operation, mesh, config);
  const SpreadInputs inputs(context, *op, mesh, c, tensors, Placement::working);
  const OperationOutput output = (*op)(inputs.inputs(), c.options);
  const DistributedTensor grad_output =
      spread(tensors.grad_output, output.attention_outputs.layout(), context.rank());
  const OperationGradients g = op->backward(inputs.inputs(), c.options, output, grad_output);
  const auto whole = [&](const DistributedTensor& tensor) {
    return tensor ? annulus::gather(tensor, context.world(), 0) : Tensor();
  };
  return {whole(output.attention_outputs), whole(g.query), whole(g.key), whole(g.value),
          whole(g.sinks)};
}

void expect_backward(Context& context, const std::string& operation, const Mesh& mesh,
                     const OperationCase& c, const OperationTensors& tensors, double tolerance,
                     Placement placement) {
  const auto op = make(context, operation, mesh);
  const SpreadInputs inputs(context, *op, mesh, c, tensors, placement);
  const OperationOutput output = (*op)(inputs.inputs(), c.options);
  const DistributedTensor grad_output =
      spread(tensors.grad_output, output.attention_outputs.layout(), context.rank());
  const OperationGradients g = op->backward(inputs.inputs(), c.options, output, grad_output);
  const std::string what = where(operation, mesh, c);
  expect_near_in_norm(g.query, tensors.grad_query, context, tolerance, what + ", grad_query");
  expect_near_in_norm(g.key, tensors.grad_key, context, tolerance, what + ", grad_key");
  expect_near_in_norm(g.value, tensors.grad_value, context, tolerance, what + ", grad_value");
  expect_near_in_norm(g.bias, tensors.grad_bias, context, tolerance, what + ", grad_bias");
  expect_near_in_norm(g.sinks, tensors.grad_sinks, context, tolerance, what + ", grad_sinks",
                      tensors.sink_magnitudes);
}

}  // namespace annulus::testing
