#pragma once

#include <cstdint>
#include <vector>

#include "kernels/types.hpp"
#include "sharding/mesh.hpp"
#include "sharding/partition_spec.hpp"

namespace annulus {

/// Part `part` of `size` elements cut into `parts` contiguous parts as even as possible: the first
/// size % parts parts hold one element more. With fewer elements than parts the last ones are
/// empty, at `size`.
Span split_evenly(std::int64_t size, std::int64_t parts, std::int64_t part);

/// The part of split_evenly() that holds element `index`.
std::int64_t part_holding(std::int64_t size, std::int64_t parts, std::int64_t index);

/// A rectangular part of a tensor: one range a dimension.
using Block = std::vector<Span>;

/// Extents of a block.
Shape shape_of(const Block& block);

/// How a tensor of any shape is spread over a mesh: dimension d is cut by split_evenly() among the
/// ranks along the axes spec[d], and copied along all other axes. Immutable.
class NamedSharding {
 public:
  /// Throws usage when the spec names an axis the mesh lacks.
  NamedSharding(Mesh mesh, PartitionSpec spec);

  const Mesh& mesh() const { return mesh_; }
  const PartitionSpec& spec() const { return spec_; }

  /// Into how many parts dimension `dim` is cut, and which of them `rank` holds.
  int parts(int dim) const { return mesh_.size(spec_[dim]); }
  int part(int rank, int dim) const { return mesh_.group_index(rank, spec_[dim]); }

  /// The global block that `rank` holds of `shape`; throws usage when the spec is longer than the
  /// shape.
  Block block(int rank, const Shape& shape) const;
  Shape local_shape(int rank, const Shape& shape) const { return shape_of(block(rank, shape)); }
  /// The axes of the mesh that cut nothing, in the mesh's order: ranks that differ along them only
  /// hold the same.
  AxisTuple unused_axes() const;
  /// All ranks that hold the same block as `rank`, itself included, rising.
  std::vector<int> replicas(int rank) const;

  std::string to_string() const;  // "(-, sp) over dp=1,fsdp=1,ep=1,tp=1,sp=4"
  friend bool operator==(const NamedSharding&, const NamedSharding&) = default;

 private:
  Mesh mesh_;
  PartitionSpec spec_;
};

}  // namespace annulus
