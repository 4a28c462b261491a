#include "runtime/gradient_sum.hpp"

#include <algorithm>
#include <utility>

#include "kernels/buffer.hpp"
#include "runtime/redistribute.hpp"

namespace annulus {

void GradientSum::over(Communicator& ranks, Tensor& gradient) const {
  if (ranks.size() == 1) return;
  const auto count = static_cast<std::size_t>(gradient.shape().elements());
  Tensor host = Tensor::copy_of(std::as_const(gradient).view(), DType::f32, Device::cpu);
  synchronize(gradient.device(), {});
  ranks.all_reduce_sum({static_cast<float*>(host.view().data), count});
  copy(std::as_const(host).view(), gradient.view());
}

DistributedTensor GradientSum::over_shared_heads(Tensor gradient,
                                                 const TensorLayout& layout) const {
  DistributedTensor partial(std::move(gradient), layout, call_.rank());
  sum_shared(partial, call_.world());
  return partial;
}

DistributedTensor GradientSum::keys(Tensor gradient, const TensorLayout& layout) const {
  if (call_.setup().key_rows == KeyRows::whole) over(call_.sequence_group(), gradient);
  return over_shared_heads(std::move(gradient), layout);
}

DistributedTensor GradientSum::bias(Tensor gradient) const {
  const AttentionSetup& setup = call_.setup();
  const TensorLayout& layout = *setup.layouts.bias;
  const Shape& whole = layout.global_shape();
  if (whole[0] != setup.shape.batch) over(call_.batch_group(), gradient);
  const bool by_query_head = whole[1] == setup.shape.q_heads;
  const bool by_kv_head = !by_query_head && whole[1] == setup.shape.kv_heads;
  if (!by_query_head && !by_kv_head) over(call_.head_group(), gradient);
  if (!by_kv_head) return {std::move(gradient), layout, call_.rank()};
  const Shape local = layout.local_shape(call_.rank());
  if (gradient.shape() != local) {
    // Query heads of one KV head come together.
    const HeadGroups groups = setup.heads.groups(setup.head_part(call_.rank()));
    Tensor folded(DType::f32, local, gradient.device());
    fill_bytes(folded.view().data, gradient.device(), 0, local.elements() * size_bytes(DType::f32));
    for (std::int64_t head = 0; head < gradient.shape()[1] && local[1] > 0; ++head) {
      const std::int64_t kv = (head + groups.q_head_offset) / groups.group_size;
      accumulate(std::as_const(gradient).view().slice(1, {head, head + 1}),
                 folded.view().slice(1, {kv, kv + 1}));
    }
    gradient = std::move(folded);
  }
  return over_shared_heads(std::move(gradient), layout);
}

DistributedTensor GradientSum::sinks(Tensor gradient) const {
  over(call_.sequence_group(), gradient);
  over(call_.batch_group(), gradient);
  return as_sinks(std::move(gradient));
}

DistributedTensor GradientSum::sinks_over_blocks(const ConstTensorView& sinks,
                                                 const ConstTensorView& log_sum_exp,
                                                 const ConstTensorView& delta,
                                                 std::int64_t block_rows) const {
  const AttentionSetup& setup = call_.setup();
  const std::int64_t blocks = (setup.shape.seq_q + block_rows - 1) / block_rows;
  const std::int64_t heads = sinks.shape[0];
  const Span batch = setup.batch(call_.rank());
  // What a rank does not have is 0 in its table: to add that changes no bit.
  Tensor table(DType::f32, {setup.shape.batch, blocks, heads});
  fill_bytes(table.view().data, Device::cpu, 0, table.shape().elements() * size_bytes(DType::f32));
  const std::span<const RowRun> runs = setup.q_rows.runs(setup.sequence_part(call_.rank()));
  for (std::int64_t b = 0; b < batch.size(); ++b) {
    for (const RowRun& run : runs) {
      for (std::int64_t row = 0; row < run.global.size(); row += block_rows) {
        const std::int64_t block = (run.global.begin + row) / block_rows;
        const Span rows{run.begin + row, run.begin + std::min(row + block_rows, run.global.size())};
        const auto at =
            static_cast<float*>(table.view().data) + ((batch.begin + b) * blocks + block) * heads;
        attention_sink_gradient(sinks, log_sum_exp.slice(0, {b, b + 1}).slice(2, rows),
                                delta.slice(0, {b, b + 1}).slice(2, rows),
                                TensorView(at, DType::f32, {heads}));
      }
    }
  }
  over(call_.sequence_group(), table);
  over(call_.batch_group(), table);
  Tensor gradient(DType::f32, {heads});
  const auto* from = static_cast<const float*>(std::as_const(table).view().data);
  for (std::int64_t head = 0; head < heads; ++head) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < setup.shape.batch * blocks; ++i) sum += from[i * heads + head];
    static_cast<float*>(gradient.view().data)[head] = static_cast<float>(sum);
  }
  return as_sinks(std::move(gradient));
}

DistributedTensor GradientSum::as_sinks(Tensor gradient) const {
  const TensorLayout& layout = *call_.setup().layouts.sinks;
  if (layout.global_shape().rank() == 1) return {std::move(gradient), layout, call_.rank()};
  Tensor row(DType::f32, {1, gradient.shape()[0]}, gradient.device());
  const TensorView flat(row.view().data, DType::f32, gradient.shape(), gradient.device());
  copy(std::as_const(gradient).view(), flat);
  return {std::move(row), layout, call_.rank()};
}

}  // namespace annulus
