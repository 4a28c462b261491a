#include "sharding/communicator.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <string>

#include "kernels/error.hpp"
#include "tests/sharding/communicator_checks.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

class ThreadCommunicatorTest : public ::testing::TestWithParam<int> {};

TEST_P(ThreadCommunicatorTest, DoesWhatEveryCommunicatorMust) {
  for (const std::uint64_t seed : {0, 11}) {
    run_ranks(GetParam(),
              [](Communicator& c) {
                check_exchanges_in_flight(c, 5);
                check_all_gather(c, 1);
                check_all_gather(c, 1000);
                check_all_reduce_sum(c, 1);
                check_all_reduce_sum(c, 777);
                check_split(c);
                check_part(c);
                check_window(c);
                c.barrier();
              },
              {.delay_seed = seed});
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, ThreadCommunicatorTest, ::testing::Values(1, 2, 3, 4, 6, 8, 13));

TEST(ThreadCommunicator, WindowsEndAtTheNode) {
  run_ranks(5,
            [](Communicator& c) {
              const auto window = c.expose(8);
              for (int peer = 0; peer < c.size(); ++peer) {
                EXPECT_EQ(window->peer(peer) != nullptr, peer / 2 == c.rank() / 2);
              }
              check_window(c);
            },
            {.ranks_per_node = 2});
}

TEST(ThreadCommunicator, ReceiveBuffersArePoisonedUntilWait) {
  run_ranks(2, [](Communicator& c) {
    const std::array<float, 2> mine{1.0F, 2.0F};
    std::array<float, 2> theirs{};
    const Send send{1 - c.rank(), mine.data(), sizeof mine};
    const Receive receive{1 - c.rank(), theirs.data(), sizeof theirs};
    const auto exchange = c.exchange({&send, 1}, {&receive, 1});
    if (c.rank() == 0) {
      EXPECT_TRUE(std::isnan(theirs[0]));
    }
    exchange->wait();
    EXPECT_EQ(theirs[1], 2.0F);
  });
}

std::string failure_of(int ranks, const std::function<void(Communicator&)>& body,
                       const ThreadRanksOptions& options = {}) {
  try {
    run_ranks(ranks, body, options);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "no failure";
}

TEST(ThreadCommunicator, OneRanksExceptionEndsAll) {
  const auto body = [](Communicator& c) {
    if (c.rank() == 2) throw std::runtime_error("rank two is ill");
    c.barrier();
  };
  EXPECT_EQ(failure_of(4, body), "rank two is ill");
}

TEST(ThreadCommunicator, SizesMustAgree) {
  const auto body = [](Communicator& c) {
    std::array<char, 16> bytes{};
    const Send send{1, bytes.data(), 12};
    const Receive receive{0, bytes.data(), 16};
    if (c.rank() == 0) c.exchange({&send, 1}, {})->wait();
    if (c.rank() == 1) c.exchange({}, {&receive, 1})->wait();
  };
  EXPECT_EQ(failure_of(2, body), "rank 0 sends 12 bytes, rank 1 receives 16");
}

TEST(ThreadCommunicator, CollectivesMustMatch) {
  const auto body = [](Communicator& c) {
    std::array<float, 2> values{};
    if (c.rank() == 0) c.barrier();
    if (c.rank() == 1) c.all_reduce_sum(values);
  };
  const std::string said = failure_of(2, body);
  EXPECT_NE(said.find(" with 1 bytes"), std::string::npos) << said;
  EXPECT_NE(said.find("calls all_reduce_sum with 8 bytes"), std::string::npos) << said;
}

TEST(ThreadCommunicator, AMessageNobodySendsIsReported) {
  const auto body = [](Communicator& c) {
    char byte = 0;
    const Receive receive{0, &byte, 1};
    if (c.rank() == 1) c.exchange({}, {&receive, 1})->wait();
  };
  EXPECT_EQ(failure_of(2, body, {.timeout_ms = 50}), "rank 1 waited for 1 transfers for 50 ms");
}

TEST(ThreadCommunicator, ADroppedExchangeIsReported) {
  const auto body = [](Communicator& c) {
    char byte = 0;
    const Receive receive{0, &byte, 1};
    if (c.rank() == 1) static_cast<void>(c.exchange({}, {&receive, 1}));
  };
  EXPECT_EQ(failure_of(2, body), "rank 1 dropped an exchange before it was complete");
}

TEST(Communicator, RefusesMessagesThatCannotBe) {
  run_ranks(2, [](Communicator& c) {
    char byte = 0;
    const Send to_nobody{7, &byte, 1};
    const Send from_nowhere{1, nullptr, 1};
    EXPECT_THROW(static_cast<void>(c.exchange({&to_nobody, 1}, {})), Error);
    EXPECT_THROW(static_cast<void>(c.exchange({&from_nowhere, 1}, {})), Error);
    const Send to_oneself{c.rank(), &byte, 1};
    EXPECT_THROW(static_cast<void>(c.exchange({&to_oneself, 1}, {})), Error);
  });
}

}  // namespace
}  // namespace annulus::testing
