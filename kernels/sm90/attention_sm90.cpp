#include "kernels/sm90/attention_sm90.hpp"

#include <array>
#include <cmath>

#include "kernels/error.hpp"
#include "kernels/sm90/hopper.hpp"

namespace annulus::kernels::sm90 {
namespace {

using Maker = ForwardVariants (*)(DType);

Maker maker(std::int64_t head_dim, std::int64_t value_dim) {
  if (head_dim == 192 && value_dim == 128) return forward_d192_v128;
  if (head_dim != value_dim) return nullptr;
  switch (head_dim) {
    case 64:
      return forward_d64;
    case 96:
      return forward_d96;
    case 128:
      return forward_d128;
    case 192:
      return forward_d192;
    case 256:
      return forward_d256;
    default:
      return nullptr;
  }
}

using BackwardMaker = BackwardVariant (*)(DType, bool soft_cap);

BackwardMaker backward_maker(std::int64_t head_dim, std::int64_t value_dim) {
  if (head_dim == 192 && value_dim == 128) return backward_d192_v128;
  switch (head_dim) {
    case 64:
      return backward_d64;
    case 96:
      return backward_d96;
    case 128:
      return backward_d128;
    case 192:
      return backward_d192;
    default:
      return backward_d256;
  }
}

/// The copy engine reads rows in pieces of 16 bytes from addresses that are multiples of 16.
std::string unaligned(const ConstTensorView& view, const char* what) {
  if (view.shape.elements() == 0) return {};
  if (reinterpret_cast<std::uintptr_t>(view.data) % 16 != 0) {
    return fmt::format("{} starts at an address that is no multiple of 16 bytes", what);
  }
  if (view.strides[3] != 1) return fmt::format("{} has head_dim stride {}", what, view.strides[3]);
  for (int dim = 0; dim < 3; ++dim) {
    if (view.shape[dim] > 1 && (view.strides[dim] <= 0 || view.strides[dim] % 8 != 0)) {
      return fmt::format("{} has stride {} in dimension {}; accepted: multiples of 8", what,
                         view.strides[dim], dim);
    }
  }
  return {};
}

std::string unsupported_tensors(const AttentionProblem& problem) {
  for (const auto& [view, what] : {std::pair{&problem.q, "query"}, std::pair{&problem.k, "key"},
                                   std::pair{&problem.v, "value"}}) {
    const std::string reason = unaligned(*view, what);
    if (!reason.empty()) return reason;
    if (view->shape[1] >= (std::int64_t{1} << 30)) {
      return fmt::format("{} has {} tokens; accepted: below 2^30", what, view->shape[1]);
    }
  }
  return {};
}

std::string unsupported(const AttentionProblem& problem, Direction /*direction*/) {
  if (problem.q.dtype != DType::f16 && problem.q.dtype != DType::bf16) {
    return fmt::format("dtype {}; accepted: f16, bf16", name(problem.q.dtype));
  }
  if (maker(problem.head_dim(), problem.value_dim()) == nullptr) {
    return fmt::format(
        "head_dim {} with value_dim {}; accepted: 64, 96, 128, 192, 256, 192 with 128",
        problem.head_dim(), problem.value_dim());
  }
  if (problem.bias) return "bias is not supported";
  if (problem.dense_mask) return "dense masks are not supported";
  if (problem.dropout.probability > 0.0F) return "dropout is not supported";
  if (!(problem.scale > 0.0F) || !std::isfinite(problem.scale)) {
    return fmt::format("scale {}; accepted: positive", problem.scale);
  }
  const std::string reason = unsupported_tensors(problem);
  if (!reason.empty()) return reason;
  return other_device();
}

void check_outputs(const ForwardCall& call) {
  if (!call.o) return;
  require(call.o.dtype == call.problem.q.dtype || call.o.dtype == DType::f32, ExitCode::usage,
          "sm90: output dtype {} for {} tensors; accepted: the same or f32", name(call.o.dtype),
          name(call.problem.q.dtype));
  const std::string reason = unaligned(call.o, "output");
  require(reason.empty(), ExitCode::usage, "sm90: {}", reason);
}

void forward(const ForwardCall& call) {
  const ForwardSegment whole{call.problem.k, call.problem.v, call.problem.mask};
  forward_segments(call, {&whole, 1});
}

void backward(const BackwardCall& call) {
  const AttentionProblem& problem = call.problem;
  std::string reason = unsupported(problem, Direction::backward);
  require(reason.empty(), ExitCode::usage, "sm90: {}", reason);
  require(!call.grad_bias, ExitCode::usage, "sm90: no gradient of a bias");
  require(call.grad_o.dtype == problem.q.dtype, ExitCode::usage,
          "sm90: output gradient of dtype {} for {} tensors; accepted: the same",
          name(call.grad_o.dtype), name(problem.q.dtype));
  reason = unaligned(call.grad_o, "output gradient");
  require(reason.empty(), ExitCode::usage, "sm90: {}", reason);
  const BackwardMaker variant_of = backward_maker(problem.head_dim(), problem.value_dim());
  launch_backward(call, variant_of(problem.q.dtype, problem.soft_cap > 0.0F));
}

constexpr std::array<AttentionBackend, 1> kBackends{
    AttentionBackend{"sm90", Device::cuda, unsupported, forward, backward, true}};

}  // namespace

std::span<const AttentionBackend> backends() { return kBackends; }

void forward_segments(const ForwardCall& call, std::span<const ForwardSegment> segments) {
  for (const ForwardSegment& segment : segments) {
    AttentionProblem part = call.problem;
    part.k = segment.k;
    part.v = segment.v;
    const std::string reason = unsupported(part, Direction::forward);
    require(reason.empty(), ExitCode::usage, "sm90: {}", reason);
  }
  check_outputs(call);
  const Maker make = maker(call.problem.head_dim(), call.problem.value_dim());
  launch_forward(call, segments, make(call.problem.q.dtype));
}

}  // namespace annulus::kernels::sm90
