#pragma once

#include <string_view>

#include "kernels/error.hpp"

namespace annulus::launch {

/// Prints `rank 3: message` once for all ranks that failed alike and ends them with `code`: where
/// all ranks get here, MPI is ended in order and the code returned for main; where some do not,
/// because they wait for this one, all are aborted.
int report_failure(ExitCode code, std::string_view message);

}  // namespace annulus::launch
