#include <array>
#include <cmath>

#include "kernels/error.hpp"
#include "kernels/sm90/decode_launch.hpp"
#include "kernels/sm90/hopper.hpp"

namespace annulus::kernels::sm90 {
namespace {

using Maker = DecodeVariant (*)(DType);

Maker maker(const DecodeProblem& problem) {
  if (problem.latent() && problem.head_dim() == 576 && problem.value_dim() == 512) {
    return decode_latent;
  }
  if (problem.head_dim() != problem.value_dim()) return nullptr;
  switch (problem.head_dim()) {
    case 64:
      return decode_d64;
    case 96:
      return decode_d96;
    case 128:
      return gathers_tokens(problem) ? decode_d128_gathered : decode_d128;
    case 192:
      return decode_d192;
    case 256:
      return decode_d256;
    default:
      return nullptr;
  }
}

/// Rows move in pieces of 16 bytes.
std::string unaligned(const ConstTensorView& view, const char* what) {
  if (view.shape.elements() == 0) return {};
  const std::int64_t piece = 16 / size_bytes(view.dtype);
  const int last = view.rank() - 1;
  if (reinterpret_cast<std::uintptr_t>(view.data) % 16 != 0) {
    return fmt::format("{} starts at an address that is no multiple of 16 bytes", what);
  }
  if (view.strides[last] != 1) {
    return fmt::format("{} has stride {} in its last dimension; accepted: 1", what,
                       view.strides[last]);
  }
  for (int dim = 0; dim < last; ++dim) {
    if (view.shape[dim] > 1 && (view.strides[dim] <= 0 || view.strides[dim] % piece != 0)) {
      return fmt::format("{} has stride {} in dimension {}; accepted: multiples of {}", what,
                         view.strides[dim], dim, piece);
    }
  }
  return {};
}

std::string unsupported(const DecodeProblem& problem) {
  if (problem.q.dtype != DType::f16 && problem.q.dtype != DType::bf16) {
    return fmt::format("dtype {}; accepted: f16, bf16", name(problem.q.dtype));
  }
  if (maker(problem) == nullptr) {
    return fmt::format(
        "head_dim {} with value_dim {}{}; accepted: 64, 96, 128, 192, 256, latent 576 with 512",
        problem.head_dim(), problem.value_dim(), problem.latent() ? " latent" : "");
  }
  if (!(problem.scale > 0.0F) || !std::isfinite(problem.scale)) {
    return fmt::format("scale {}; accepted: positive", problem.scale);
  }
  for (const auto& [view, what] : {std::pair{&problem.q, "query"}, std::pair{&problem.k, "key"},
                                   std::pair{&problem.v, "value"}}) {
    const std::string reason = unaligned(*view, what);
    if (!reason.empty()) return reason;
  }
  if (problem.sinks && problem.sinks.strides[0] != 1) {
    return fmt::format("sinks have stride {}; accepted: 1", problem.sinks.strides[0]);
  }
  return other_device();
}

void check_outputs(const DecodeCall& call) {
  require(!call.o || call.o.dtype == call.problem.q.dtype || call.o.dtype == DType::f32,
          ExitCode::usage, "sm90 decode: output dtype {} for {} tensors; accepted: the same or f32",
          name(call.o.dtype), name(call.problem.q.dtype));
  const std::string reason =
      call.o ? unaligned(call.o, "output") : unaligned(call.state.accumulator, "accumulator");
  require(reason.empty(), ExitCode::usage, "sm90 decode: {}", reason);
}

void forward(const DecodeCall& call) {
  check_outputs(call);
  launch_decode(call, maker(call.problem)(call.problem.q.dtype));
}

constexpr std::array<DecodeBackend, 1> kBackends{
    DecodeBackend{"sm90", Device::cuda, unsupported, forward}};

}  // namespace

std::span<const DecodeBackend> decode_backends() { return kBackends; }

}  // namespace annulus::kernels::sm90
