#include "kernels/attention.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/attention_reference.hpp"
#include "kernels/buffer.hpp"
#include "kernels/cpu/attention_cpu.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"

namespace annulus {
namespace {

void check_rank(const ConstTensorView& view, std::string_view what) {
  require(static_cast<bool>(view) || view.shape.elements() == 0, ExitCode::bad_data,
          "attention: {} has no data", what);
  require(view.rank() == 4, ExitCode::bad_data,
          "attention: {} has shape {}; expected [batch, seq, heads, head_dim]", what,
          view.shape.to_string());
}

void check_heads(const AttentionProblem& problem) {
  const HeadGroups& groups = problem.groups;
  require(problem.kv_heads() > 0 || problem.q_heads() == 0, ExitCode::bad_data,
          "attention: {} query heads and no KV heads", problem.q_heads());
  if (groups.group_size > 0) {
    const std::int64_t last = (problem.q_heads() - 1 + groups.q_head_offset) / groups.group_size;
    require(problem.q_heads() == 0 || last < problem.kv_heads(), ExitCode::bad_data,
            "attention: query head {} needs KV head {} of {}", problem.q_heads() - 1, last,
            problem.kv_heads());
    return;
  }
  require(problem.q_heads() == 0 || problem.q_heads() % problem.kv_heads() == 0, ExitCode::bad_data,
          "attention: {} query heads do not group over {} KV heads; accepted: a multiple",
          problem.q_heads(), problem.kv_heads());
}

void check_pair_tensor(const AttentionProblem& problem, const ConstTensorView& view,
                       std::string_view what) {
  if (!view) return;
  const auto fits = [](std::int64_t extent, std::int64_t full) {
    return extent == full || extent == 1;
  };
  require(view.rank() == 4 && fits(view.shape[0], problem.batch()) &&
              fits(view.shape[1], problem.q_heads()) && view.shape[2] == problem.seq_q() &&
              view.shape[3] == problem.seq_kv(),
          ExitCode::bad_data, "attention: {} has shape {}; expected [{}|1, {}|1, {}, {}]", what,
          view.shape.to_string(), problem.batch(), problem.q_heads(), problem.seq_q(),
          problem.seq_kv());
}

void check_slices(const AttentionProblem& problem) {
  const auto offsets = static_cast<std::int64_t>(problem.mask.batch_offsets.size());
  require(offsets == 0 || offsets == problem.batch() + 1, ExitCode::internal,
          "attention: {} batch offsets of slices for batch {}", offsets, problem.batch());
  for (const Slice& slice : problem.mask.slices) {
    require(slice.area() == 0 || (slice.q.begin >= 0 && slice.q.end <= problem.seq_q() &&
                                  slice.k.begin >= 0 && slice.k.end <= problem.seq_kv()),
            ExitCode::internal, "attention: slice q [{}, {}) k [{}, {}) leaves {} x {} rows",
            slice.q.begin, slice.q.end, slice.k.begin, slice.k.end, problem.seq_q(),
            problem.seq_kv());
  }
}

/// A place for results, or results given back, where there is one.
void check_place(const ConstTensorView& view, std::string_view what, const Shape& shape,
                 std::span<const DType> accepted) {
  if (!view) return;
  require(view.shape == shape &&
              std::find(accepted.begin(), accepted.end(), view.dtype) != accepted.end(),
          ExitCode::bad_data, "attention: {} is {} {}; expected {} {}", what, name(view.dtype),
          view.shape.to_string(), name(accepted.front()), shape.to_string());
}

// Statistics and states are f32, and f64 beside f64; the reference, by which the others are
// measured, also computes in doubles beside other inputs.
std::array<DType, 2> wide(const AttentionProblem& problem, const AttentionBackend& backend) {
  if (problem.q.dtype == DType::f64) return {DType::f64, DType::f64};
  return {DType::f32, backend.name == "reference" ? DType::f64 : DType::f32};
}

Shape output_shape(const AttentionProblem& problem) {
  return {problem.batch(), problem.seq_q(), problem.q_heads(), problem.value_dim()};
}

Shape row_shape(const AttentionProblem& problem) {
  return {problem.batch(), problem.q_heads(), problem.seq_q()};
}

bool serves(const AttentionBackend& backend, std::string_view name) {
  return name.empty() || backend.name == name;
}

}  // namespace

void validate(const AttentionProblem& problem) {
  check_rank(problem.q, "query");
  check_rank(problem.k, "key");
  check_rank(problem.v, "value");
  require(problem.k.shape[0] == problem.batch() && problem.v.shape[0] == problem.batch(),
          ExitCode::bad_data, "attention: batch {} of query, {} of key, {} of value differ",
          problem.batch(), problem.k.shape[0], problem.v.shape[0]);
  require(problem.k.shape[3] == problem.head_dim(), ExitCode::bad_data,
          "attention: head_dim {} of query, {} of key differ", problem.head_dim(),
          problem.k.shape[3]);
  require(problem.v.shape[1] == problem.seq_kv() && problem.v.shape[2] == problem.kv_heads(),
          ExitCode::bad_data, "attention: key {} and value {} differ in tokens or heads",
          problem.k.shape.to_string(), problem.v.shape.to_string());
  require(problem.q.dtype == problem.k.dtype && problem.k.dtype == problem.v.dtype,
          ExitCode::bad_data, "attention: dtypes {} of query, {} of key, {} of value differ",
          name(problem.q.dtype), name(problem.k.dtype), name(problem.v.dtype));
  check_heads(problem);
  require(
      !problem.sinks || (problem.sinks.rank() == 1 && problem.sinks.shape[0] == problem.q_heads()),
      ExitCode::bad_data, "attention: sinks have shape {}; expected [{}]",
      problem.sinks.shape.to_string(), problem.q_heads());
  check_pair_tensor(problem, problem.bias, "bias");
  check_pair_tensor(problem, problem.dense_mask, "mask");
  require(problem.dropout.probability >= 0.0F && problem.dropout.probability < 1.0F,
          ExitCode::usage, "attention: dropout {}; accepted: 0 <= p < 1",
          problem.dropout.probability);
  require(std::isfinite(problem.scale), ExitCode::usage, "attention: scale {}; accepted: finite",
          problem.scale);
  require(problem.soft_cap >= 0.0F && std::isfinite(problem.soft_cap), ExitCode::usage,
          "attention: soft cap {}; accepted: finite, >= 0", problem.soft_cap);
  check_slices(problem);
}

std::span<const AttentionBackend> attention_backends() {
  static const std::vector<AttentionBackend> backends = [] {
    const std::span<const AttentionBackend> device = kernels::cuda::backends();
    std::vector<AttentionBackend> all(device.begin(), device.end());
    all.push_back({"cpu", Device::cpu, kernels::cpu::unsupported, kernels::cpu::forward,
                   kernels::cpu::backward});
    all.push_back({"reference", Device::cpu, kernels::reference::unsupported,
                   kernels::reference::forward, kernels::reference::backward});
    return all;
  }();
  return backends;
}

const AttentionBackend& select_backend(const AttentionProblem& problem, Direction direction,
                                       std::string_view name) {
  std::string reasons;
  for (const AttentionBackend& backend : attention_backends()) {
    if (!serves(backend, name) || backend.device != problem.q.device) continue;
    const std::string reason = backend.unsupported(problem, direction);
    if (reason.empty()) return backend;
    reasons += fmt::format("{}{}: {}", reasons.empty() ? "" : "; ", backend.name, reason);
  }
  throw Error(
      ExitCode::usage,
      fmt::format("attention: no backend{}{} for {} tensors{}{}", name.empty() ? "" : " named ",
                  name, annulus::name(problem.q.device), reasons.empty() ? "" : ": ", reasons));
}

void attention_forward(const ForwardCall& call, std::string_view backend) {
  validate(call.problem);
  require(call.o || call.state.accumulator, ExitCode::internal,
          "attention: neither an output nor a state to write");
  require(call.start == ForwardCall::Start::fresh || call.state.accumulator, ExitCode::internal,
          "attention: nothing to resume from");
  const AttentionBackend& chosen = select_backend(call.problem, Direction::forward, backend);
  const std::array<DType, 2> statistics = wide(call.problem, chosen);
  check_place(call.o, "output", output_shape(call.problem),
              std::array{DType::f32, DType::f16, DType::bf16, statistics[1]});
  check_place(call.log_sum_exp, "log_sum_exp", row_shape(call.problem), statistics);
  check_place(call.state.accumulator, "accumulator", output_shape(call.problem), statistics);
  check_place(call.state.row_max, "row_max", row_shape(call.problem), statistics);
  check_place(call.state.row_sum, "row_sum", row_shape(call.problem), statistics);
  chosen.forward(call);
}

void attention_backward(const BackwardCall& call, std::string_view backend) {
  validate(call.problem);
  const AttentionBackend& chosen = select_backend(call.problem, Direction::backward, backend);
  const std::array<DType, 2> statistics = wide(call.problem, chosen);
  const std::array inputs{call.problem.q.dtype};
  check_place(call.grad_o, "grad_o", output_shape(call.problem), inputs);
  check_place(call.o, "output", output_shape(call.problem), inputs);
  check_place(call.log_sum_exp, "log_sum_exp", row_shape(call.problem), statistics);
  check_place(call.delta, "delta", row_shape(call.problem), statistics);
  check_place(call.grad_q, "grad_q", call.problem.q.shape, statistics);
  check_place(call.grad_k, "grad_k", call.problem.k.shape, statistics);
  check_place(call.grad_v, "grad_v", call.problem.v.shape, statistics);
  check_place(call.grad_bias, "grad_bias", call.problem.bias.shape, statistics);
  if (call.overwrites_kv && !chosen.overwrites_kv) {
    clear(call.grad_k, call.stream);
    clear(call.grad_v, call.stream);
  }
  chosen.backward(call);
}

}  // namespace annulus
