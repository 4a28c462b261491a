#pragma once

#include <array>
#include <optional>
#include <vector>

#include "kernels/types.hpp"
#include "sharding/mesh.hpp"
#include "sharding/partition_spec.hpp"

namespace annulus {

/// The part of `spec` that divides `shape` exactly. The spec is padded or cut to the rank of the
/// shape; an entry with an axis the mesh lacks, or whose axes do not divide the extent, is dropped
/// whole. Axes of size 1 stay, extent 0 divides, and a spec that splits nothing becomes empty.
/// For callers that need equal blocks: NamedSharding itself also cuts unevenly.
PartitionSpec corrected_spec(const Shape& shape, const PartitionSpec& spec, const Mesh& mesh);

/// What an operation keeps of the sharding of its queries, keys and values.
struct StableShardingOptions {
  /// Dimensions whose entries stay (negative ones count from the end); absent: all.
  std::optional<std::vector<int>> preserved_indices = std::nullopt;
  /// Entries of the preserved dimensions come from here rather than from the state.
  std::optional<PartitionSpec> clone = std::nullopt;
  /// Absent: the tensor depends on nothing, and the result is absent.
  std::optional<bool> dep = true;
  /// Corrects the result for this shape.
  std::optional<Shape> tensor = std::nullopt;
};

/// The dimensions that operations preserve: of BTHD, and for block-sparse ones of BHTD.
inline constexpr std::array<int, 2> kPreservedByFlash = {0, 2};
inline constexpr std::array<int, 3> kPreservedByRing = {0, 1, 2};
inline constexpr std::array<int, 2> kPreservedByBlocksparse = {0, 1};

/// The sharding an operation works with, from the one its input has; absent when there is none.
/// Throws usage when a preserved index is outside the state or the clone.
std::optional<PartitionSpec> create_stable_sharding(const std::optional<PartitionSpec>& state,
                                                    const Mesh& mesh,
                                                    const StableShardingOptions& options = {});

}  // namespace annulus
