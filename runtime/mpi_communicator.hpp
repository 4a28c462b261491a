#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sharding/communicator.hpp"

namespace annulus {

/// An MPI communicator as MPI_Comm_c2f gives it, so that this header needs no mpi.h.
struct MpiHandle {
  int fortran = 0;
};

/// The ranks of a communicator by their numbers in MPI_COMM_WORLD, which reports and logs use.
std::vector<int> world_ranks_of(MpiHandle handle);

struct MpiOptions {
  /// Longer messages travel in pieces of so many bytes, the same on all ranks. Open MPI's single
  /// copy moves 13 GB/s in pieces of 1 MB and half of it in pieces of 16 MB and more, which fall
  /// out of the cache between its passes; counts of MPI end at 2^31 - 1 anyhow.
  std::int64_t chunk_bytes = std::int64_t{1} << 20;

  /// How a rank waits for an exchange: it asks MPI all the time, or sleeps in between, which leaves
  /// its core to others. MPI's own yielding does not: with 4 ranks on 2 cores the scheduler took
  /// the one that waited for one at work, left three on the other core, and a step of decode took 5
  /// to 16% longer. by_cores: asleep where the ranks of a node outnumber its cores.
  enum class Waiting : std::uint8_t { by_cores, awake, asleep };
  Waiting waiting = Waiting::by_cores;
};

/// A communicator over a duplicate of the caller's; host memory only. Messages match in the order
/// in which both sides give them; a message of another size or out of turn throws Error(peer) with
/// the sizes. Windows are shared memory of the node. Collective over the handle's ranks.
std::unique_ptr<Communicator> make_mpi_communicator(MpiHandle handle,
                                                    const MpiOptions& options = {});

}  // namespace annulus
