#pragma once

#include <string>
#include <string_view>

#include "runtime/operation_log.hpp"
#include "runtime/signal_text.hpp"

namespace annulus {

/// Who this process is, in messages and dumps. Before MPI runs the launcher's variables tell.
struct ProcessIdentity {
  int rank = 0;
  int size = 1;
  std::string host;
  std::string dump_folder;  // of the ranks of one job alike
};

/// From OMPI_COMM_WORLD_* or SLURM_*; the folder is ANNULUS_DUMP_DIR or annulus-steps.JOB.
ProcessIdentity identity_from_environment();

/// Makes the identity known to the functions below, which signal handlers may call.
void identify_process(const ProcessIdentity& identity);

/// "rank 2 (node1): ".
void append_identity(SignalText& text) noexcept;
/// "step 17: exchange with rank 3, 1024 of 2048 bytes outstanding".
void append_step(SignalText& text, const StepRecord& step) noexcept;
/// Phase, and the step that is waited for or else the last one: "phase computing, step 17: ...".
void append_whereabouts(SignalText& text) noexcept;

/// Writes the kept steps to FOLDER/rank-N, over those of an earlier call; false when it cannot.
/// Async-signal-safe.
bool dump_steps(std::string_view reason) noexcept;
/// Where dump_steps() writes; its text lives for ever.
std::string_view dump_folder() noexcept;

}  // namespace annulus
