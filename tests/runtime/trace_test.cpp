#include "runtime/trace.hpp"

#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

/// Every rank's clock is off by its own: ahead or behind, by seconds.
void check_offsets(int ranks, const ThreadRanksOptions& options) {
  run_ranks(
      ranks,
      [](Communicator& c) {
        constexpr std::int64_t kSecondNs = 1'000'000'000;
        const std::int64_t error = (c.rank() % 2 == 0 ? 3 : -5) * c.rank() * kSecondNs;
        const std::int64_t begun = record_clock_ns();
        const std::int64_t offset =
            clock_offset_ns(c, [error] { return record_clock_ns() + error; });
        const std::int64_t took = record_clock_ns() - begun;
        // The fastest of 16 round trips took a sixteenth of them all at most.
        EXPECT_LE(std::abs(offset + error), took / 32) << "rank " << c.rank();
      },
      options);
}

TEST(Trace, ClocksAreLaidOverTheFirstRanks) {
  for (const int ranks : {1, 2, 5}) check_offsets(ranks, {});
}

TEST(Trace, LateMessagesShiftClocksByNoMoreThanTheirRoundTrip) {
  for (const std::uint64_t seed : {1U, 2U, 3U}) check_offsets(4, {.delay_seed = seed});
}

}  // namespace
}  // namespace annulus::testing
