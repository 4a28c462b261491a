#include <cuda_runtime.h>

#include <array>
#include <optional>

#include "kernels/buffer.hpp"
#include "kernels/cuda/check.hpp"
#include "kernels/cudnn/backward_cudnn.hpp"
#include "kernels/cudnn/sdpa_plan.hpp"
#include "kernels/cudnn_support.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cudnn {
namespace {

/// The one band over all queries and keys, if the mask is that.
std::optional<Band> single_band(const AttentionProblem& problem) {
  if (!problem.mask.batch_offsets.empty() || problem.mask.slices.size() != 1) return std::nullopt;
  const Slice& slice = problem.mask.slices.front();
  const Span rows{0, problem.seq_q()};
  const Span keys{0, problem.seq_kv()};
  // A slice is as tight as its band: what it leaves out must be what the band leaves out.
  const Slice whole = clip({rows, keys, slice.band}, rows, keys);
  if (!(whole == clip(slice, rows, keys))) return std::nullopt;
  return slice.band;
}

bool has_default_groups(const AttentionProblem& problem) {
  const HeadGroups& groups = problem.groups;
  return groups.q_head_offset == 0 && problem.q_heads() % problem.kv_heads() == 0 &&
         (groups.group_size == 0 || groups.group_size == problem.q_heads() / problem.kv_heads());
}

bool is_aligned(const ConstTensorView& view) {
  constexpr std::int64_t kElements = 8;  // 16 bytes
  return view.strides[3] == 1 && view.strides[0] % kElements == 0 &&
         view.strides[1] % kElements == 0 && view.strides[2] % kElements == 0 &&
         reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
}

std::string unsupported_tensors(const AttentionProblem& problem) {
  if (problem.q.dtype != DType::bf16 && problem.q.dtype != DType::f16) {
    return fmt::format("{}; f16 and bf16 only", name(problem.q.dtype));
  }
  if (problem.head_dim() % 8 != 0 || problem.value_dim() % 8 != 0 || problem.head_dim() > 256 ||
      problem.value_dim() > 256) {
    return fmt::format("head_dim {} and {}; multiples of 8 up to 256 only", problem.head_dim(),
                       problem.value_dim());
  }
  if (!is_aligned(problem.q) || !is_aligned(problem.k) || !is_aligned(problem.v)) {
    return "rows that are not aligned to 16 bytes";
  }
  return "";
}

std::string unsupported_forward(const AttentionProblem& problem) {
  if (problem.q.shape.elements() == 0 || problem.k.shape.elements() == 0) return "empty tensors";
  if (problem.bias && problem.bias.dtype != problem.q.dtype) return "bias of another dtype";
  if (!has_default_groups(problem)) return "query heads that start inside a group";
  if (problem.seq_q() == 1 && problem.sinks) return "sinks with a single query";
  const std::optional<Band> band = single_band(problem);
  if (!band.has_value() || !band_form(*band, problem.seq_q(), problem.seq_kv()).has_value()) {
    return "one causal or windowed band over all tokens only";
  }
  return "";
}

std::string unsupported(const AttentionProblem& problem, Direction direction) {
  if (problem.soft_cap > 0.0F) return "no soft cap";
  if (problem.dense_mask) return "no dense mask";
  if (problem.dropout.probability > 0.0F) return "no dropout by global position";
  const std::string reason = unsupported_tensors(problem);
  if (!reason.empty()) return reason;
  if (direction == Direction::forward) return unsupported_forward(problem);
  return problem.bias ? "no gradient of a bias" : "";
}

SdpaDescriptor descriptor_of(const ForwardCall& call) {
  const AttentionProblem& problem = call.problem;
  SdpaDescriptor descriptor;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&descriptor.device));
  descriptor.dtype = problem.q.dtype;
  descriptor.q = rows_layout(problem.q);
  descriptor.k = rows_layout(problem.k);
  descriptor.v = rows_layout(problem.v);
  descriptor.o = rows_layout(call.o);
  descriptor.bias = pairs_layout(problem.bias);
  descriptor.stats = statistics_layout(call.log_sum_exp);
  descriptor.sinks = static_cast<bool>(problem.sinks);
  descriptor.band = *band_form(*single_band(problem), problem.seq_q(), problem.seq_kv());
  descriptor.scale = problem.scale;
  return descriptor;
}

void forward(const ForwardCall& call) {
  require(!call.state.accumulator, ExitCode::usage,
          "cudnn: carries no state between calls; its output has 16 bits");
  const AttentionProblem& problem = call.problem;
  // cuDNN writes O in the input's dtype.
  Buffer rounded;
  ForwardCall direct = call;
  if (call.o.dtype != problem.q.dtype) {
    rounded =
        Buffer(Device::cuda, call.o.shape.elements() * size_bytes(problem.q.dtype), call.stream);
    direct.o = {rounded.data(), problem.q.dtype, call.o.shape, Device::cuda};
  }
  run_sdpa(descriptor_of(direct),
           {problem.q.data, problem.k.data, problem.v.data, problem.bias.data, problem.sinks.data,
            direct.o.data, call.log_sum_exp.data},
           static_cast<cudaStream_t>(call.stream.handle));
  if (call.o.dtype != problem.q.dtype) copy(direct.o, call.o, call.stream);
}

constexpr std::array<AttentionBackend, 1> kBackends{
    AttentionBackend{"cudnn", Device::cuda, unsupported, forward, backward}};

}  // namespace

std::span<const AttentionBackend> backends() { return kBackends; }

}  // namespace annulus::kernels::cudnn
