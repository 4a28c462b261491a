#pragma once

#include "kernels/types.hpp"
#include "sharding/partition_manager.hpp"

/// What the calls of attention over rows and of attention over a cache share.
namespace annulus {

/// The same memory as [batch, seq, heads, dim]; statistics and sinks (one or two dimensions) as
/// they are.
ConstTensorView in_bthd(const ConstTensorView& view, DimOrder order);

/// A view to hand to code that only reads through tensors.
TensorView readable(const ConstTensorView& view);

}  // namespace annulus
