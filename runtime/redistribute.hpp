#pragma once

#include <optional>

#include "kernels/types.hpp"
#include "runtime/distributed_tensor.hpp"
#include "runtime/tensor.hpp"
#include "sharding/communicator.hpp"
#include "sharding/tensor_layout.hpp"

namespace annulus {

/// The same global tensor in another layout, on the same device. Collective over `ranks`, the ranks
/// of the mesh in order. Only elements that a rank needs and does not hold move, each once. Throws
/// usage when shapes or ranks differ.
DistributedTensor redistribute(const DistributedTensor& from, const TensorLayout& to,
                               Communicator& ranks, Stream stream = {});

/// The same into memory that is there; dtype and device must be those of `from`.
void redistribute_into(const DistributedTensor& from, DistributedTensor& to, Communicator& ranks,
                       Stream stream = {});

/// The global tensor on `root`, an absent one elsewhere; on all ranks without a root. Collective.
Tensor gather(const DistributedTensor& tensor, Communicator& ranks,
              std::optional<int> root = std::nullopt, Stream stream = {});

/// Adds up the f32 partial sums that ranks hold of the same element because parts of a dimension
/// share it, as those of KV heads that several ranks need: in rank order, the same bits on all of
/// them. Copies along unused axes are left as they are. Collective; nothing moves where no parts
/// share.
void sum_shared(DistributedTensor& partial, Communicator& ranks, Stream stream = {});

}  // namespace annulus
