#include "runtime/decode_operation.hpp"

#include "kernels/error.hpp"
#include "runtime/attention_setup.hpp"
#include "runtime/cache_call.hpp"

namespace annulus {
namespace {

OperationOutput run_call(const DecodeOperation& operation, const AttentionInputs& inputs,
                         const AttentionOptions& options, Device device) {
  CacheCall call(operation, inputs, options, device);
  call.agree();
  return call.run();
}

}  // namespace

OperationOutput DecodeOperation::forward_native(const AttentionInputs& inputs,
                                                const AttentionOptions& options) {
  return run_call(*this, inputs, options, Device::cpu);
}

OperationOutput DecodeOperation::forward_cuda(const AttentionInputs& inputs,
                                              const AttentionOptions& options) {
  require(metadata().context->device() == Device::cuda, ExitCode::usage,
          "{}: backend {} needs a CUDA device on every rank; use --backend cpu", name(),
          metadata().backend);
  return run_call(*this, inputs, options, Device::cuda);
}

AttentionLayouts DecodeOperation::layouts(const AttentionShape& shape,
                                          const AttentionOptions& options) const {
  DecodeSetup setup{.query = {shape.batch, shape.seq_q, shape.q_heads, shape.head_dim},
                    .kv_heads = shape.kv_heads,
                    .value_dim = shape.value_dim,
                    .packed = options.order == DimOrder::thd,
                    .mesh = metadata().mesh,
                    .axes = cache_axes(metadata())};
  for (std::int64_t b = 0; b <= shape.batch; ++b) setup.query_begin.push_back(b * shape.seq_q);
  AttentionLayouts layouts{.query = setup.query_layout(shape.head_dim),
                           .key = setup.given_layout(shape.seq_kv, shape.head_dim),
                           .value = setup.given_layout(shape.seq_kv, shape.value_dim),
                           .output = setup.output(),
                           .log_sum_exp = setup.log_sum_exp(),
                           .weights = setup.log_sum_exp(),
                           .bias = std::nullopt,
                           .mask = std::nullopt,
                           .sinks = std::nullopt};
  if (shape.sinks.rank() > 0) layouts.sinks = setup.sinks();
  return layouts;
}

}  // namespace annulus
