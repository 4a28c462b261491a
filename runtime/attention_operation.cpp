#include "runtime/attention_operation.hpp"

#include "kernels/error.hpp"
#include "runtime/attention_call.hpp"
#include "runtime/gradient_sum.hpp"
#include "sharding/block_forward.hpp"

namespace annulus {
namespace {

/// Where the caller wants rows of results: as its query lies.
TensorLayout wanted_rows(const AttentionInputs& inputs, const AttentionOptions& options) {
  return bthd_layout(inputs.query.layout(), options.order);
}

OperationOutput run_forward(const AttentionOperation& operation, const AttentionInputs& inputs,
                            const AttentionOptions& options, Device device) {
  AttentionCall call(operation, inputs, options, device);
  call.agree();
  call.bring_inputs();
  const AttentionLayouts& layouts = call.setup().layouts;
  const DType dtype = options.output_dtype.value_or(operation.metadata().runtime_dtype);
  Tensor o = call.local(dtype, layouts.output);
  Tensor log_sum_exp;
  if (options.log_sum_exp) log_sum_exp = call.local(DType::f32, layouts.log_sum_exp);
  call.forward(o.view(), log_sum_exp.view());

  OperationOutput output;
  const TensorLayout query = wanted_rows(inputs, options);
  output.attention_outputs =
      call.leave(std::move(o), layouts.output, output_layout(query, call.setup().shape.value_dim));
  if (log_sum_exp) {
    output.log_sum_exp = call.leave(std::move(log_sum_exp), layouts.log_sum_exp, row_layout(query));
  }
  if (options.attention_weights) {
    Tensor weights = call.local(dtype, layouts.weights);
    call.weights(weights.view());
    output.attention_weights = call.leave(std::move(weights), layouts.weights, layouts.weights);
  }
  if (operation.requires_cache()) output.cache_view = call.cache();
  output.report = call.report();
  return output;
}

/// A result of the forward call, or the gradient of one, has the shape of `layout`.
void check_given(const DistributedTensor& tensor, std::string_view what,
                 const TensorLayout& layout) {
  require(static_cast<bool>(tensor), ExitCode::usage, "the backward pass needs {}", what);
  check_tensor(&tensor, what, layout.mesh());
  require(tensor.global_shape() == layout.global_shape(), ExitCode::bad_data,
          "{} is {}, expected {}", what, tensor.global_shape().to_string(),
          layout.global_shape().to_string());
}

Tensor cleared(const AttentionCall& call, const Shape& shape) {
  Tensor tensor(DType::f32, shape, call.device());
  clear(tensor.view());
  return tensor;
}

}  // namespace

std::shared_ptr<const PlanRequest> AttentionOperation::choose(
    PlanRequest request, const AttentionShape& /*shape*/) const {
  request.scheme = traits_.scheme;
  return std::make_shared<const PlanRequest>(std::move(request));
}

AttentionLayouts AttentionOperation::layouts(const AttentionShape& shape,
                                             const AttentionOptions& options) const {
  return make_setup(metadata(), shape, options, causal(options), traits_.key_rows).layouts;
}

OperationOutput AttentionOperation::forward_native(const AttentionInputs& inputs,
                                                   const AttentionOptions& options) {
  return run_forward(*this, inputs, options, Device::cpu);
}

OperationOutput AttentionOperation::forward_cuda(const AttentionInputs& inputs,
                                                 const AttentionOptions& options) {
  require(metadata().context->device() == Device::cuda, ExitCode::usage,
          "{}: backend {} needs a CUDA device on every rank; use --backend cpu", name(),
          metadata().backend);
  return run_forward(*this, inputs, options, Device::cuda);
}

OperationGradients AttentionOperation::backward(const AttentionInputs& inputs,
                                                const AttentionOptions& options,
                                                const OperationOutput& output,
                                                const DistributedTensor& grad_output) {
  const bool on_device =
      !native_is_forced() && (metadata().backend == "cuda" || metadata().backend == "cudnn");
  AttentionCall call(*this, inputs, options, on_device ? Device::cuda : Device::cpu);
  call.check([&] {
    const AttentionLayouts& layouts = call.setup().layouts;
    check_given(output.attention_outputs, "attention_outputs", layouts.output);
    check_given(output.log_sum_exp, "log_sum_exp", layouts.log_sum_exp);
    check_given(grad_output, "grad_output", layouts.output);
  });
  call.agree({&output.attention_outputs, &output.log_sum_exp, &grad_output});
  call.bring_inputs();
  const AttentionLayouts& layouts = call.setup().layouts;
  const WorkingInput o = call.bring(output.attention_outputs, DimOrder::bthd, layouts.output,
                                    output.attention_outputs.dtype());
  const WorkingInput grad_o =
      call.bring(grad_output, DimOrder::bthd, layouts.output, metadata().runtime_dtype);
  const WorkingInput log_sum_exp =
      call.bring(output.log_sum_exp, DimOrder::bthd, layouts.log_sum_exp, DType::f32);
  const AttentionProblem problem = call.problem();
  Tensor delta = call.local(DType::f32, layouts.log_sum_exp);
  attention_delta(o.view, grad_o.view, delta.view());

  Tensor grad_q = cleared(call, problem.q.shape);
  const bool overwrites = call.is_one_backward();
  const auto of_keys = [&](const Shape& shape) {
    return overwrites ? Tensor(DType::f32, shape, call.device()) : cleared(call, shape);
  };
  Tensor grad_k = of_keys(problem.k.shape);
  Tensor grad_v = of_keys(problem.v.shape);
  Tensor grad_bias;
  if (problem.bias) grad_bias = cleared(call, problem.bias.shape);
  BackwardCall local;
  local.grad_o = grad_o.view;
  local.log_sum_exp = log_sum_exp.view;
  local.delta = std::as_const(delta).view();
  if (o.view.dtype == problem.q.dtype) local.o = o.view;
  local.grad_q = grad_q.view();
  local.grad_k = grad_k.view();
  local.grad_v = grad_v.view();
  local.grad_bias = grad_bias.view();
  local.deterministic = options.reproducible;
  local.overwrites_kv = overwrites;
  call.backward(local);

  const GradientSum sum(call);
  OperationGradients gradients;
  gradients.query = call.leave(std::move(grad_q), layouts.query, wanted_rows(inputs, options));
  gradients.key = call.leave(sum.keys(std::move(grad_k), layouts.key),
                             bthd_layout(inputs.key.layout(), options.order));
  gradients.value = call.leave(sum.keys(std::move(grad_v), layouts.value),
                               bthd_layout(inputs.value.layout(), options.order));
  if (layouts.bias) {
    gradients.bias = call.leave(sum.bias(std::move(grad_bias)), inputs.bias->layout());
  }
  if (layouts.sinks && options.reproducible) {
    gradients.sinks = call.leave(
        sum.sinks_over_blocks(problem.sinks, log_sum_exp.view, std::as_const(delta).view(),
                              reproducible_query_rows(call.setup().shape.seq_q)),
        inputs.sinks->layout());
  } else if (layouts.sinks) {
    Tensor grad_sinks = cleared(call, problem.sinks.shape);
    attention_sink_gradient(problem.sinks, log_sum_exp.view, std::as_const(delta).view(),
                            grad_sinks.view());
    gradients.sinks = call.leave(sum.sinks(std::move(grad_sinks)), inputs.sinks->layout());
  }
  gradients.report = call.report();
  return gradients;
}

}  // namespace annulus
