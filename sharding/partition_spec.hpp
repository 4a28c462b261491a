#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "sharding/mesh.hpp"

namespace annulus {

/// Per dimension the mesh axes that split it: none, one, or a tuple taken as one axis. Dimensions
/// beyond the last entry are not split. An immutable value.
class PartitionSpec {
 public:
  PartitionSpec() = default;
  /// Empty tuples mean "not split". Throws usage for a name that is no identifier or an axis that
  /// stands twice.
  explicit PartitionSpec(std::vector<AxisTuple> entries);

  /// Text as to_string() writes it: "((fsdp,dp), sp, tp, -)"; "()" is empty, "none" means "-".
  static PartitionSpec parse(std::string_view text);

  bool empty() const { return entries_.empty(); }
  int size() const { return static_cast<int>(entries_.size()); }
  /// Axes of dimension `dim`; empty when it is not split, also beyond the last entry.
  const AxisTuple& operator[](int dim) const;
  const std::vector<AxisTuple>& entries() const { return entries_; }

  std::string to_string() const;
  friend bool operator==(const PartitionSpec&, const PartitionSpec&) = default;

 private:
  std::vector<AxisTuple> entries_;
};

}  // namespace annulus
