#include "runtime/mpi_check.hpp"

#include <mpi.h>

#include "kernels/error.hpp"

namespace annulus {

std::string mpi_error_text(int code) {
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) return "unknown error";
  return {text, static_cast<std::size_t>(length)};
}

void check_mpi(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  throw Error(ExitCode::peer, fmt::format("{}: {}", call, mpi_error_text(code)));
}

}  // namespace annulus
