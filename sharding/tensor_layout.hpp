#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "kernels/types.hpp"
#include "sharding/named_sharding.hpp"

namespace annulus {

/// Global ranges of one dimension in the order in which they lie in memory.
using Runs = std::vector<Span>;

/// Which rank holds what of one global tensor: a rank's shard is the product over the dimensions of
/// the runs it holds. By default the one block of its sharding; a dimension can be dealt otherwise
/// (a zigzag sequence, KV heads that several ranks need). Immutable.
class TensorLayout {
 public:
  /// Throws usage when the spec is longer than the shape.
  TensorLayout(const Shape& global_shape, NamedSharding sharding);
  /// The whole tensor on one rank, nothing on the others.
  static TensorLayout only_on(int root, const Shape& global_shape, const Mesh& mesh);

  /// Part p of dimension `dim` holds runs_of_part[p]. Parts may share indices; together they hold
  /// all. Throws usage when the parts are not as many as the sharding cuts, a run leaves the
  /// dimension, two runs of a part overlap, or an index lies nowhere.
  TensorLayout with_runs(int dim, std::vector<Runs> runs_of_part) const;

  const Shape& global_shape() const { return global_shape_; }
  const NamedSharding& sharding() const { return sharding_; }
  const Mesh& mesh() const { return sharding_.mesh(); }
  /// The only rank that holds anything, or nothing.
  std::optional<int> root() const { return root_; }

  /// Empty runs are left out, here and in runs().
  Runs runs_of_part(int dim, int part) const;
  Runs runs(int rank, int dim) const;
  /// Whether several parts of `dim` hold the same index.
  bool shares(int dim) const;
  Shape local_shape(int rank) const;
  /// Global index along `dim` of local index `local` on `rank`.
  std::int64_t global_index(int rank, int dim, std::int64_t local) const;

  std::string to_string() const;  // "[2, 8, 3] (-, sp) over sp=4"
  friend bool operator==(const TensorLayout&, const TensorLayout&) = default;

 private:
  struct Dealt {
    std::vector<Runs> runs_of_part;
    bool shared = false;
    friend bool operator==(const Dealt&, const Dealt&) = default;
  };

  Shape global_shape_;
  NamedSharding sharding_;
  std::map<int, Dealt> dealt_;  // by dimension
  std::optional<int> root_;
};

}  // namespace annulus
