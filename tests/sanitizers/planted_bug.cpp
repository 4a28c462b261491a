// A program with one mistake a kind, run under mpirun in builds with sanitizers: each build must
// report its own, or its silence about the rest of the tests would mean nothing.
//   planted_bug none|overflow|leak|undefined|race

#include <mpi.h>

#include <cstddef>
#include <cstdio>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "runtime/leak_check.hpp"

namespace {

/// Reads one value beyond what the neighbour sent.
int overflow(int rank, int ranks) {
  const int sent = rank;
  std::unique_ptr<int[]> received(new int[1]);
  MPI_Sendrecv(&sent, 1, MPI_INT, (rank + 1) % ranks, 0, received.get(), 1, MPI_INT,
               (rank + ranks - 1) % ranks, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  volatile int beyond = 1;
  return received[static_cast<std::size_t>(beyond)];
}

int leak() {
  auto* lost = new std::vector<int>(1000);
  const int first = (*lost)[0];
  lost = nullptr;
  return first + (lost == nullptr ? 0 : 1);
}

int undefined(int rank) {
  volatile int large = 2147483647;
  return large + rank + 1;
}

int race() {
  int shared = 0;
  std::thread other([&] { ++shared; });
  ++shared;
  other.join();
  return shared;
}

}  // namespace

int main(int argc, char** argv) {
  int level = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &level);
  int rank = 0;
  int ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  const std::string_view bug = argc > 1 ? argv[1] : "";
  int result = 0;
  if (bug == "overflow") result = overflow(rank, ranks);
  if (bug == "leak") result = leak();
  if (bug == "undefined") result = undefined(rank);
  if (bug == "race") result = race();
  std::printf("rank %d: %d\n", rank, result);
  annulus::check_for_leaks();
  MPI_Finalize();
  return 0;
}
