#include <cuda_runtime.h>

#include <array>
#include <limits>
#include <optional>

#include "kernels/buffer.hpp"
#include "kernels/cuda/check.hpp"
#include "kernels/cudnn/sdpa_plan.hpp"
#include "kernels/cudnn_support.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cudnn {
namespace {

/// cuDNN's form of a mask: bounds measured from one of two diagonals.
struct BandForm {
  bool causal = false;
  Diagonal diagonal = Diagonal::none;
  std::int64_t left_bound = 0;
};

/// [batch, seq, heads, dim] as cuDNN's [batch, heads, seq, dim].
TensorLayout layout_of(const ConstTensorView& view) {
  return {{view.shape[0], view.shape[2], view.shape[1], view.shape[3]},
          {view.strides[0], view.strides[2], view.strides[1], view.strides[3]}};
}

TensorLayout bias_layout(const ConstTensorView& bias) {
  if (!bias) return {};
  return {{bias.shape[0], bias.shape[1], bias.shape[2], bias.shape[3]},
          {bias.strides[0], bias.strides[1], bias.strides[2], bias.strides[3]}};
}

TensorLayout statistics_layout(const ConstTensorView& view) {
  if (!view) return {};
  return {{view.shape[0], view.shape[1], view.shape[2], 1},
          {view.strides[0], view.strides[1], view.strides[2], 1}};
}

bool is_bounded(std::int64_t bound) { return -kUnbounded < bound && bound < kUnbounded; }

/// Absent when cuDNN has no form for the band.
std::optional<BandForm> band_form(const Band& band, std::int64_t seq_q, std::int64_t seq_kv) {
  const std::int64_t corner = seq_kv - seq_q;  // k - q on the bottom-right diagonal
  BandForm form;
  std::int64_t diagonal = corner;
  if (is_bounded(band.hi)) {
    if (band.hi != 0 && band.hi != corner) return std::nullopt;
    form.causal = true;
    diagonal = band.hi;
  }
  if (form.causal || is_bounded(band.lo)) {
    form.diagonal = diagonal == 0 ? Diagonal::top_left : Diagonal::bottom_right;
  }
  if (form.diagonal == Diagonal::bottom_right && seq_q > seq_kv) return std::nullopt;
  if (!is_bounded(band.lo)) return form;
  form.left_bound = diagonal - band.lo + 1;
  const bool windows =
      form.left_bound > 0 && seq_q <= seq_kv && form.left_bound <= std::numeric_limits<int>::max();
  return windows ? std::optional(form) : std::nullopt;
}

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

std::string unsupported_shape(const AttentionProblem& problem) {
  if (problem.q.shape.elements() == 0 || problem.k.shape.elements() == 0) return "empty tensors";
  if (problem.head_dim() % 8 != 0 || problem.value_dim() % 8 != 0 || problem.head_dim() > 256 ||
      problem.value_dim() > 256) {
    return fmt::format("head_dim {} and {}; multiples of 8 up to 256 only", problem.head_dim(),
                       problem.value_dim());
  }
  if (!is_aligned(problem.q) || !is_aligned(problem.k) || !is_aligned(problem.v)) {
    return "rows that are not aligned to 16 bytes";
  }
  if (!has_default_groups(problem)) return "query heads that start inside a group";
  if (problem.seq_q() == 1 && problem.sinks) return "sinks with a single query";
  return "";
}

std::string unsupported(const AttentionProblem& problem, Direction direction) {
  if (direction == Direction::backward) return "forward only";
  if (problem.q.dtype != DType::bf16 && problem.q.dtype != DType::f16) {
    return fmt::format("{}; f16 and bf16 only", name(problem.q.dtype));
  }
  if (problem.soft_cap > 0.0F) return "no soft cap";
  if (problem.dense_mask) return "no dense mask";
  if (problem.dropout.probability > 0.0F) return "no dropout by global position";
  if (problem.bias && problem.bias.dtype != problem.q.dtype) return "bias of another dtype";
  const std::string shape = unsupported_shape(problem);
  if (!shape.empty()) return shape;
  const std::optional<Band> band = single_band(problem);
  if (!band.has_value() || !band_form(*band, problem.seq_q(), problem.seq_kv()).has_value()) {
    return "one causal or windowed band over all tokens only";
  }
  return "";
}

SdpaDescriptor descriptor_of(const ForwardCall& call) {
  const AttentionProblem& problem = call.problem;
  const BandForm band = *band_form(*single_band(problem), problem.seq_q(), problem.seq_kv());
  SdpaDescriptor descriptor;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&descriptor.device));
  descriptor.dtype = problem.q.dtype;
  descriptor.q = layout_of(problem.q);
  descriptor.k = layout_of(problem.k);
  descriptor.v = layout_of(problem.v);
  descriptor.o = layout_of(call.o);
  descriptor.bias = bias_layout(problem.bias);
  descriptor.stats = statistics_layout(call.log_sum_exp);
  descriptor.sinks = static_cast<bool>(problem.sinks);
  descriptor.causal = band.causal;
  descriptor.diagonal = band.diagonal;
  descriptor.left_bound = band.left_bound;
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

void backward(const BackwardCall& /*call*/) {
  throw Error(ExitCode::internal, "cudnn: backward was not offered");
}

constexpr std::array<AttentionBackend, 1> kBackends{
    AttentionBackend{"cudnn", Device::cuda, unsupported, forward, backward}};

}  // namespace

std::span<const AttentionBackend> backends() { return kBackends; }

}  // namespace annulus::kernels::cudnn
