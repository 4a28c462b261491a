#pragma once

#include <string>

namespace annulus {

/// Text of an MPI error code.
std::string mpi_error_text(int code);

/// Throws Error(peer) with the call and MPI's own text unless `code` is MPI_SUCCESS.
void check_mpi(int code, const char* call);

}  // namespace annulus

/// Needs MPI_ERRORS_RETURN on the handle.
#define ANNULUS_CHECK_MPI(call) ::annulus::check_mpi((call), #call)
