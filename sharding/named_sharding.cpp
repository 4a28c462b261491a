#include "sharding/named_sharding.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/error.hpp"

namespace annulus {

Span split_evenly(std::int64_t size, std::int64_t parts, std::int64_t part) {
  require(size >= 0 && 0 <= part && part < parts, ExitCode::internal,
          "split: part {} of {} elements in {} parts does not exist", part, size, parts);
  const std::int64_t small = size / parts;
  const std::int64_t larger = size % parts;
  const std::int64_t begin = part * small + std::min(part, larger);
  return {begin, begin + small + (part < larger ? 1 : 0)};
}

std::int64_t part_holding(std::int64_t size, std::int64_t parts, std::int64_t index) {
  require(parts >= 1 && 0 <= index && index < size, ExitCode::internal,
          "split: no part of {} elements in {} parts holds index {}", size, parts, index);
  const std::int64_t small = size / parts;
  const std::int64_t larger = size % parts;
  const std::int64_t in_larger = larger * (small + 1);
  return index < in_larger ? index / (small + 1) : larger + (index - in_larger) / small;
}

Shape shape_of(const Block& block) {
  std::vector<std::int64_t> dims;
  for (const Span span : block) dims.push_back(span.size());
  return Shape(dims);
}

NamedSharding::NamedSharding(Mesh mesh, PartitionSpec spec)
    : mesh_(std::move(mesh)), spec_(std::move(spec)) {
  for (const AxisTuple& axes : spec_.entries()) {
    for (const std::string& axis : axes) {
      require(mesh_.has(axis), ExitCode::usage,
              "sharding: spec {} names axis '{}', mesh {} has no "
              "such axis",
              spec_.to_string(), axis, mesh_.to_string());
    }
  }
}

Block NamedSharding::block(int rank, const Shape& shape) const {
  require(spec_.size() <= shape.rank(), ExitCode::usage,
          "sharding: spec {} has {} entries for the {} dimensions of {}", spec_.to_string(),
          spec_.size(), shape.rank(), shape.to_string());
  Block block;
  for (int dim = 0; dim < shape.rank(); ++dim) {
    block.push_back(split_evenly(shape[dim], parts(dim), part(rank, dim)));
  }
  return block;
}

AxisTuple NamedSharding::unused_axes() const {
  AxisTuple unused;
  for (const MeshAxis& axis : mesh_.axes()) {
    const auto uses = [&](const AxisTuple& axes) {
      return std::find(axes.begin(), axes.end(), axis.name) != axes.end();
    };
    if (std::none_of(spec_.entries().begin(), spec_.entries().end(), uses)) {
      unused.push_back(axis.name);
    }
  }
  return unused;
}

std::vector<int> NamedSharding::replicas(int rank) const {
  return mesh_.group(rank, unused_axes());
}

std::string NamedSharding::to_string() const {
  return fmt::format("{} over {}", spec_.to_string(), mesh_.to_string());
}

}  // namespace annulus
