#pragma once

#include <cstdint>
#include <functional>

#include "sharding/communicator.hpp"

namespace annulus::testing {

struct ThreadRanksOptions {
  /// Not 0: ranks sleep for random short times between their calls.
  std::uint64_t delay_seed = 0;
  /// Windows are readable among so many consecutive ranks; 0: among all.
  int ranks_per_node = 0;
  /// A rank that waits longer throws and takes the others with it.
  std::int64_t timeout_ms = 20'000;
};

/// Runs `body` as `ranks` threads joined by a communicator. Prints what every rank threw and
/// rethrows the exception that came first; the other ranks' calls then throw at once.
///
/// It is stricter than MPI: a send completes only once its receive is posted; bytes move as late
/// as the rules allow, so memory touched before wait() shows; receive buffers and fresh windows
/// hold 0xFF (NaN) until data arrives; collectives that do not match throw on every rank; an
/// exchange dropped before it is complete is an error.
void run_ranks(int ranks, const std::function<void(Communicator&)>& body,
               const ThreadRanksOptions& options = {});

}  // namespace annulus::testing
