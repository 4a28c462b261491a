#pragma once

#include <string_view>

#include "kernels/error.hpp"

namespace annulus::launch {

/// Prints `rank 3: message` once for all ranks that failed alike and ends them with `code`: where
/// all ranks get here, MPI is ended in order and the code returned for main; where some do not,
/// because they wait for this one, all are aborted.
int report_failure(ExitCode code, std::string_view message);

/// From here on this rank works alone, before MPI starts: the others may have ended, so that a
/// failure does not start MPI to meet them.
void leave_peers();

}  // namespace annulus::launch
