#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "sharding/communicator.hpp"
#include "sharding/stage_recorder.hpp"

namespace annulus {

/// Where the operations of this process record their stages: null unless a trace was started, so
/// that without one nothing is recorded.
StageRecorder* trace_recorder();
void start_trace();

/// Writes what all ranks recorded to `path` on rank 0, in the trace format of Chrome, which
/// chrome://tracing and Perfetto show: a process for each rank, with a row for its computation, one
/// for its communication and those of its transfers under way. The clocks are laid over rank 0's by
/// the fastest of some round trips. Ends the trace. Collective; throws cannot_create.
void write_trace(Communicator& ranks, const std::string& path);

/// What rank 0's clock shows less what this rank's does, in nanoseconds: as network time does it,
/// off by half of the fastest of 16 round trips at most. Collective.
std::int64_t clock_offset_ns(Communicator& ranks,
                             const std::function<std::int64_t()>& clock = record_clock_ns);

}  // namespace annulus
