#include "runtime/default_backend.hpp"

#include <algorithm>
#include <array>
#include <vector>

#include "kernels/attention.hpp"

namespace annulus {
namespace {

/// One query and key with the widths and options of the attention: kernels refuse by those.
bool has_kernel(const BackendNeeds& needs) {
  alignas(64) static const std::array<std::byte, 64> memory{};
  const auto view = [](DType dtype, const Shape& shape) {
    return ConstTensorView(memory.data(), dtype, shape, Device::cuda);
  };
  const AttentionShape& shape = needs.shape;
  const std::vector<Slice> slices{{{0, 2}, {0, 2}, {}}};
  AttentionProblem problem;
  problem.q = view(needs.dtype, {1, 2, shape.q_heads, shape.head_dim});
  problem.k = view(needs.dtype, {1, 2, shape.kv_heads, shape.head_dim});
  problem.v = view(needs.dtype, {1, 2, shape.kv_heads, shape.value_dim});
  problem.mask = {slices, {}};
  problem.scale = needs.scale;
  problem.soft_cap = needs.soft_cap;
  problem.dropout.probability = needs.dropout;
  if (shape.sinks.rank() > 0) problem.sinks = view(DType::f32, {shape.q_heads});
  if (shape.bias.rank() > 0) problem.bias = view(needs.dtype, {1, 1, 2, 2});
  if (shape.mask.rank() > 0) problem.dense_mask = view(DType::u8, {1, 1, 2, 2});
  const auto serves = [&](Direction direction) {
    const std::span<const AttentionBackend> all = attention_backends();
    return std::any_of(all.begin(), all.end(), [&](const AttentionBackend& backend) {
      return backend.device == Device::cuda && backend.unsupported(problem, direction).empty();
    });
  };
  return serves(Direction::forward) && (!needs.backward || serves(Direction::backward));
}

}  // namespace

std::string default_backend(Context& context, const BackendNeeds& needs) {
  const bool host_only = needs.weights || needs.reproducible;
  if (context.device() != Device::cuda || host_only) return "cpu";
  const std::byte mine{has_kernel(needs) ? std::uint8_t{1} : std::uint8_t{0}};
  std::vector<std::byte> all(static_cast<std::size_t>(context.size()));
  context.world().all_gather({&mine, 1}, all);
  return std::count(all.begin(), all.end(), std::byte{1}) == context.size() ? "cuda" : "cpu";
}

}  // namespace annulus
