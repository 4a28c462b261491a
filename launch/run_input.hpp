#pragma once

#include <optional>

#include "launch/options.hpp"
#include "runtime/attention_inputs.hpp"
#include "runtime/checkpoint.hpp"
#include "runtime/context.hpp"
#include "runtime/distributed_tensor.hpp"

namespace annulus::launch {

/// Shapes of the file's tensors, known before any of them is read.
AttentionShape attention_shape(const Checkpoint& checkpoint);

/// The part of a global tensor that `rank` holds in `layout`.
Selection selection_of(const TensorLayout& layout, int rank);

/// This rank's parts of what attention takes.
struct RunInput {
  DistributedTensor query;
  DistributedTensor key;
  DistributedTensor value;
  std::optional<DistributedTensor> bias;
  std::optional<DistributedTensor> mask;
  std::optional<DistributedTensor> sinks;

  AttentionInputs view() const;
};

/// Reads every tensor straight into the layout that the operation works in, in `dtype`. Collective.
RunInput read_input(Context& context, const Checkpoint& checkpoint, const AttentionLayouts& layouts,
                    DType dtype);

/// One field in one layout. Collective.
DistributedTensor read_field(Context& context, const Checkpoint& checkpoint, CheckpointField field,
                             const TensorLayout& layout, DType dtype);

}  // namespace annulus::launch
