#include "sharding/partition_manager.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <vector>

#include "kernels/error.hpp"

namespace annulus {
namespace {

int sequence_dim(DimOrder order) {
  constexpr std::array<int, 3> kDims = {1, 2, 0};
  return kDims[static_cast<std::size_t>(order)];
}

}  // namespace

std::string_view name(DimOrder order) {
  constexpr std::array<std::string_view, 3> kNames = {"bthd", "bhtd", "thd"};
  return kNames[static_cast<std::size_t>(order)];
}

Mode get_mode(const Shape& query, DimOrder order) {
  const int rank = order == DimOrder::thd ? 3 : 4;
  require(query.rank() == rank, ExitCode::bad_data, "mode: query {} is not {} of {} dimensions",
          query.to_string(), name(order), rank);
  return query[sequence_dim(order)] == 1 ? Mode::decode : Mode::train;
}

bool causal_in(Mode mode, bool causal) { return causal && mode != Mode::decode; }

void PartitionManager::register_axis(std::string name, AxisRule rule) {
  require(is_axis_name(name) && name != "_", ExitCode::usage,
          "partition: '{}' is not a letter or '_' followed by letters, digits or '_'", name);
  require(axis_.find(name) == nullptr, ExitCode::usage,
          "partition: semantic axis {} is built in; change it in the PartitionAxis", name);
  const auto [at, fresh] = registered_.emplace(std::move(name), std::move(rule));
  require(fresh, ExitCode::usage, "partition: semantic axis {} is already registered", at->first);
}

const AxisTuple& PartitionManager::axes_of(std::string_view semantic, Mode mode) const {
  static const AxisTuple kNone;
  if (semantic == "_") return kNone;
  if (const AxisRule* rule = axis_.find(semantic)) return rule->in(mode);
  if (const auto at = registered_.find(semantic); at != registered_.end()) {
    return at->second.in(mode);
  }
  std::vector<std::string_view> names = PartitionAxis::names();
  for (const auto& entry : registered_) names.push_back(entry.first);
  throw Error(ExitCode::usage, fmt::format("partition: unknown semantic axis '{}'; known are {}",
                                           semantic, fmt::join(names, ", ")));
}

PartitionSpec PartitionManager::resolve(std::span<const std::string_view> semantics,
                                        Mode mode) const {
  std::vector<AxisTuple> entries;
  for (const std::string_view semantic : semantics) entries.push_back(axes_of(semantic, mode));
  return PartitionSpec(std::move(entries));
}

AttentionShardings PartitionManager::get_shardings(Mode mode, DimOrder order) const {
  AttentionShardings specs;
  specs.query3d = resolve({"batch", "head", "head_dim"}, mode);
  specs.sinks1d = resolve({"head"}, mode);
  specs.sinks2d = resolve({"_", "head"}, mode);
  specs.segment_ids = resolve({"batch", "query_length"}, mode);
  specs.kv_segment_ids = resolve({"batch", "key_length"}, mode);
  specs.bias = resolve({"batch", "bias_head", "query_length", "bias_key_length"}, mode);
  switch (order) {
    case DimOrder::bthd:
      specs.query = resolve({"batch", "query_length", "head", "head_dim"}, mode);
      specs.key = resolve({"batch", "key_length", "kv_head", "kv_head_dim"}, mode);
      break;
    case DimOrder::bhtd:
      specs.query = resolve({"batch", "head", "query_length", "head_dim"}, mode);
      specs.key = resolve({"batch", "kv_head", "key_length", "kv_head_dim"}, mode);
      break;
    case DimOrder::thd:
      specs.query = resolve({"query_length", "head", "head_dim"}, mode);
      specs.key = resolve({"key_length", "kv_head", "kv_head_dim"}, mode);
      specs.segment_ids = resolve({"query_length"}, mode);
      specs.kv_segment_ids = resolve({"key_length"}, mode);
      specs.bias = resolve({"bias_head", "query_length", "bias_key_length"}, mode);
      break;
  }
  specs.value = specs.key;
  specs.output = specs.query;
  specs.mask = specs.bias;
  return specs;
}

}  // namespace annulus
