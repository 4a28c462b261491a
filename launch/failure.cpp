#include "launch/failure.hpp"

#include <mpi.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "runtime/context.hpp"
#include "runtime/leak_check.hpp"
#include "runtime/operation_log.hpp"
#include "runtime/signals.hpp"

namespace annulus::launch {
namespace {

// Ranks that fail alike get here within milliseconds of each other, even four on one core.
constexpr std::chrono::milliseconds kGrace{2000};

bool works_alone = false;

bool mpi_was_started() {
  int started = 0;
  MPI_Initialized(&started);
  return started != 0;
}

bool mpi_is_running() {
  int ended = 0;
  MPI_Finalized(&ended);
  return mpi_was_started() && ended == 0;
}

bool launched_with_peers() {
  const char* size = std::getenv("OMPI_COMM_WORLD_SIZE");
  return size != nullptr && std::atoi(size) > 1;
}

bool all_ranks_meet() {
  MPI_Request request = MPI_REQUEST_NULL;
  if (MPI_Ibarrier(MPI_COMM_WORLD, &request) != MPI_SUCCESS) return false;
  const auto deadline = std::chrono::steady_clock::now() + kGrace;
  int met = 0;
  while (met == 0 && std::chrono::steady_clock::now() < deadline) {
    if (MPI_Test(&request, &met, MPI_STATUS_IGNORE) != MPI_SUCCESS) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return met != 0;
}

/// True unless a lower rank failed with the same message, and says it.
bool is_first_to_say(int rank, std::string_view message) {
  int ranks = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  const auto mine = std::hash<std::string_view>{}(message);
  std::vector<std::size_t> all(static_cast<std::size_t>(ranks));
  MPI_Allgather(&mine, sizeof mine, MPI_BYTE, all.data(), sizeof mine, MPI_BYTE, MPI_COMM_WORLD);
  for (int lower = 0; lower < rank; ++lower) {
    if (all[static_cast<std::size_t>(lower)] == mine) return false;
  }
  return true;
}

void print(int rank, std::string_view message) {
  // One write, so that lines of several ranks do not mix.
  const std::string line = "rank " + std::to_string(rank) + ": " + std::string(message) + "\n";
  std::fputs(line.c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace

int report_failure(ExitCode code, std::string_view message) {
  // A rank may fail before MPI starts, on its command line say, and its peers may not.
  if (!mpi_was_started() && launched_with_peers() && !works_alone) MPI_Init(nullptr, nullptr);
  if (!mpi_is_running()) {
    print(0, message);
    return static_cast<int>(code);
  }
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  if (!all_ranks_meet()) {
    print(rank, message);
    end_all_ranks(code);
  }
  const LoggedStep step("report of a failure");
  const WaitForStep wait(step);
  if (is_first_to_say(rank, message)) print(rank, message);
  MPI_Barrier(MPI_COMM_WORLD);  // all is said before the launcher sees the first rank end
  set_agreed_end(static_cast<int>(code));
  check_for_leaks();
  MPI_Finalize();
  return static_cast<int>(code);
}

void leave_peers() { works_alone = true; }

}  // namespace annulus::launch
