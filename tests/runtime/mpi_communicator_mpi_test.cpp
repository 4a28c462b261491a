#include "runtime/mpi_communicator.hpp"

#include <gtest/gtest.h>
#include <mpi.h>

#include <array>
#include <chrono>
#include <ctime>
#include <string>
#include <thread>

#include "kernels/error.hpp"
#include "tests/sharding/communicator_checks.hpp"

namespace annulus::testing {
namespace {

std::unique_ptr<Communicator> world(std::int64_t chunk_bytes) {
  return make_mpi_communicator({MPI_Comm_c2f(MPI_COMM_WORLD)}, {.chunk_bytes = chunk_bytes});
}

class MpiCommunicatorTest : public ::testing::TestWithParam<std::int64_t> {};

TEST_P(MpiCommunicatorTest, DoesWhatEveryCommunicatorMust) {
  const auto c = world(GetParam());
  check_exchanges_in_flight(*c, 7);
  check_all_gather(*c, 1);
  check_all_gather(*c, 5000);
  check_all_reduce_sum(*c, 1);
  check_all_reduce_sum(*c, 4321);
  check_split(*c);
  check_part(*c);
  check_window(*c);
  c->barrier();
}

INSTANTIATE_TEST_SUITE_P(ChunkBytes, MpiCommunicatorTest,
                         ::testing::Values(1024, 4096, std::int64_t{1} << 20));

TEST(MpiCommunicator, MessagesOfManyPiecesArriveWhole) {
  const auto c = world(1024);
  const int next = (c->rank() + 1) % c->size();
  const int previous = (c->rank() + c->size() - 1) % c->size();
  const int length = (5 << 20) / 4 + 3;
  const std::vector<int> mine = message(c->rank(), next, 1, length);
  std::vector<int> theirs(mine.size(), -1);
  const Send send{next, mine.data(), static_cast<std::int64_t>(mine.size() * sizeof(int))};
  const Receive receive{previous, theirs.data(),
                        static_cast<std::int64_t>(theirs.size() * sizeof(int))};
  c->exchange({&send, 1}, {&receive, 1})->wait();
  EXPECT_EQ(theirs, message(previous, c->rank(), 1, length));
}

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

TEST(MpiCommunicator, SleepsWhileItWaitsWhereAsked) {
  const auto c = make_mpi_communicator({MPI_Comm_c2f(MPI_COMM_WORLD)},
                                       {.waiting = MpiOptions::Waiting::asleep});
  if (c->size() < 2) GTEST_SKIP() << "one rank";
  constexpr std::chrono::milliseconds kLate(300);
  char byte = static_cast<char>(c->rank());
  c->barrier();
  if (c->rank() == 1) {
    std::this_thread::sleep_for(kLate);
    const Send send{0, &byte, 1};
    c->exchange({&send, 1}, {})->wait();
  }
  if (c->rank() == 0) {
    const Receive receive{1, &byte, 1};
    const double before = cpu_seconds();
    c->exchange({}, {&receive, 1})->wait();
    EXPECT_LT(cpu_seconds() - before, 0.1) << "of " << kLate.count() << " ms";
    EXPECT_EQ(byte, 1);
  }
}

/// What rank 1 says when rank 0 sends `sent` bytes, then 100, and rank 1 expects `expected`. The
/// messages are short enough for MPI to let the sender go on.
std::string receive_error(std::int64_t sent, std::int64_t expected) {
  const auto c = world(1024);
  std::string said = "nothing";
  if (c->rank() == 0) {
    const std::vector<char> bytes(4096, 1);
    const std::array<Send, 2> sends{{{1, bytes.data(), sent}, {1, bytes.data(), 100}}};
    c->exchange(sends, {})->wait();
  }
  c->barrier();
  if (c->rank() == 1) {
    std::vector<char> into(8192);
    const Receive receive{0, into.data(), expected};
    try {
      c->exchange({}, {&receive, 1})->wait();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::peer);
      said = error.what();
    }
  }
  c->barrier();
  return c->rank() == 1 ? said : "";
}

TEST(MpiCommunicator, AMessageOfAnotherSizeIsSeen) {
  if (world(1024)->size() < 2) GTEST_SKIP() << "needs two ranks";
  const struct {
    std::int64_t sent, expected;
    const char* said;
  } cases[] = {
      {12, 16, "exchange: expected piece 1 of 16 bytes from rank 0, got piece 1 of 12 bytes"},
      {1500, 1600, "exchange: expected piece 3 of 576 bytes from rank 0, got piece 3 of 476"},
      {1024, 2048, "exchange: expected piece 0 of 1024 bytes from rank 0, got piece 1 of 1024"},
      {1500, 1024, "exchange: expected piece 1 of 1024 bytes from rank 0, got piece 0 of 1024"},
      {1500, 1400, "exchange: receiving 376 bytes from rank 0 failed: MPI_ERR_TRUNCATE"},
  };
  for (const auto& wrong : cases) {
    const std::string said = receive_error(wrong.sent, wrong.expected);
    if (said.empty()) continue;
    EXPECT_EQ(said.substr(0, std::string(wrong.said).size()), wrong.said);
  }
}

TEST(MpiCommunicator, RefusesChunksThatMpiCannotCount) {
  EXPECT_THROW(static_cast<void>(world(0)), Error);
  EXPECT_THROW(static_cast<void>(world(std::int64_t{1} << 31)), Error);
}

}  // namespace
}  // namespace annulus::testing
