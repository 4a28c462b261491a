#pragma once

#include "sharding/execution.hpp"

namespace annulus {

/// The forward pass of a ring in one kernel launch, on devices whose copy engines move the rows:
/// all stages' rows are on their way when the kernel starts, and it waits in front of each segment
/// until that has arrived. Nothing is carried from stage to stage; in exchange the rows of all
/// stages are held at a time. Or, where one device has the memory of all ranks, in a launch that
/// reads every rank's rows where they lie. False where neither can be done, and then nothing was
/// done; each rank decides for itself, for the messages, or the windows, are those of the stages.
/// See execute_forward.
bool forward_in_one_launch(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                           const ExecuteOptions& options);

}  // namespace annulus
