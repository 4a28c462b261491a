#include "sharding/stable_sharding.hpp"

#include <algorithm>

#include "kernels/error.hpp"

namespace annulus {
namespace {

bool divides(const AxisTuple& axes, std::int64_t extent, const Mesh& mesh) {
  const auto known = [&](const std::string& axis) { return mesh.has(axis); };
  return std::all_of(axes.begin(), axes.end(), known) && extent % mesh.size(axes) == 0;
}

int checked_index(int index, const PartitionSpec& state, const PartitionSpec& source) {
  const int from_start = index < 0 ? index + state.size() : index;
  require(0 <= from_start && from_start < state.size(), ExitCode::usage,
          "stable sharding: preserved index {} is outside the {} entries of {}", index,
          state.size(), state.to_string());
  require(from_start < source.size(), ExitCode::usage,
          "stable sharding: preserved index {} is outside the {} entries of the clone {}", index,
          source.size(), source.to_string());
  return from_start;
}

PartitionSpec preserved(const PartitionSpec& state, const std::vector<int>& indices,
                        const PartitionSpec& source) {
  std::vector<AxisTuple> entries(static_cast<std::size_t>(state.size()));
  for (const int index : indices) {
    const int dim = checked_index(index, state, source);
    entries[static_cast<std::size_t>(dim)] = source[dim];
  }
  return PartitionSpec(std::move(entries));
}

}  // namespace

PartitionSpec corrected_spec(const Shape& shape, const PartitionSpec& spec, const Mesh& mesh) {
  std::vector<AxisTuple> entries;
  bool splits = false;
  for (int dim = 0; dim < shape.rank(); ++dim) {
    const bool keep = divides(spec[dim], shape[dim], mesh);
    entries.push_back(keep ? spec[dim] : AxisTuple{});
    splits = splits || !entries.back().empty();
  }
  return splits ? PartitionSpec(std::move(entries)) : PartitionSpec();
}

std::optional<PartitionSpec> create_stable_sharding(const std::optional<PartitionSpec>& state,
                                                    const Mesh& mesh,
                                                    const StableShardingOptions& options) {
  if (!state || !options.dep) return std::nullopt;
  PartitionSpec result = *state;
  if (options.preserved_indices) {
    result = preserved(*state, *options.preserved_indices, options.clone.value_or(*state));
  }
  return options.tensor ? corrected_spec(*options.tensor, result, mesh) : result;
}

}  // namespace annulus
