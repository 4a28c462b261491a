#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "sharding/mesh.hpp"

namespace annulus {

/// What a program does with its sequences: decode and insert add one token to a cache.
enum class Mode { train, prefill, decode, insert };

std::string_view name(Mode mode);

/// Mesh axes of one semantic axis; a decode value, where set, replaces the other in modes decode
/// and insert.
struct AxisRule {
  AxisTuple train;
  std::optional<AxisTuple> decode = std::nullopt;

  const AxisTuple& in(Mode mode) const;
  friend bool operator==(const AxisRule&, const AxisRule&) = default;
};

/// Which mesh axes split which meaning of a dimension.
struct PartitionAxis {
  AxisRule batch{{"fsdp", "dp"}};
  AxisRule sequence{{"sp"}};
  AxisRule query_length{{"sp"}};
  AxisRule key_length{{"sp"}};
  AxisRule head{{"tp"}};
  AxisRule kv_head{{"tp"}};
  AxisRule hidden{{"tp"}};
  AxisRule mlp{{"tp"}};
  AxisRule vocab{{"tp"}};
  AxisRule expert{{"ep"}};
  AxisRule expert_gate{{}};
  AxisRule head_dim{{}};
  AxisRule kv_head_dim{{}};
  AxisRule bias_head{{}};
  AxisRule bias_key_length{{}};

  /// The rule of a semantic axis by its field's name, as "batch"; null when there is none.
  const AxisRule* find(std::string_view semantic) const;
  /// The names find() knows.
  static std::vector<std::string_view> names();

  friend bool operator==(const PartitionAxis&, const PartitionAxis&) = default;
};

}  // namespace annulus
