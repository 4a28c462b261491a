#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/types.hpp"
#include "sharding/tensor_layout.hpp"

namespace annulus {

/// `size` indices of one dimension: from `from` on in the sender's shard, from `to` on in the
/// receiver's.
struct Segment1d {
  std::int64_t from = 0;
  std::int64_t to = 0;
  std::int64_t size = 0;
  friend bool operator==(const Segment1d&, const Segment1d&) = default;
};

/// What one rank gives another: the product of the segments of all dimensions.
struct ShardTransfer {
  int peer = 0;
  std::vector<std::vector<Segment1d>> segments;  // a list a dimension

  /// Extents of the message, the segments of each dimension one after the other.
  Shape message_shape() const;
};

/// The transfers of one rank, peers rising; what it keeps has itself as peer and stands in both.
struct Redistribution {
  std::vector<ShardTransfer> sends;
  std::vector<ShardTransfer> receives;
};

/// What `source` gives `target` when a tensor changes from one layout to the other. Every element
/// of the target's new shard comes from one rank: from itself if it holds it, else from the holder
/// nearest along the axes of the old mesh, so that replicas share the sending. Absent: nothing.
/// @pre both layouts have the same global shape and number of ranks
std::optional<ShardTransfer> transfer_between(const TensorLayout& from, const TensorLayout& to,
                                              int source, int target);

/// Throws usage when the layouts differ in global shape or number of ranks.
Redistribution plan_redistribution(const TensorLayout& from, const TensorLayout& to, int rank);

/// What `rank` holds too of the shards of others, because parts of a dimension share indices: a
/// send and a receive for each of them. Copies along unused axes do not count.
Redistribution shared_parts(const TensorLayout& layout, int rank);

}  // namespace annulus
