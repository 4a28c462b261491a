#include "runtime/divergence.hpp"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "kernels/error.hpp"
#include "runtime/flight_recorder.hpp"

namespace annulus {
namespace {

using State = StepRecord::State;

RankDump::Step collective(std::int64_t number, const std::string& name, std::int64_t bytes,
                          State state = State::done) {
  RankDump::Step step;
  step.name = name;
  step.record.number = number;
  step.record.group = 77;
  step.record.group_number = number;
  step.record.bytes = bytes;
  step.record.peer.fill(-1);
  step.record.state = state;
  return step;
}

RankDump::Step exchange(std::int64_t number, int peer, State state) {
  RankDump::Step step = collective(number, "exchange", 64, state);
  step.record.group_number = 0;
  step.record.peers = 1;
  step.record.peer[0] = peer;
  return step;
}

RankDump dump(int rank, std::vector<RankDump::Step> steps, int size = 4) {
  RankDump result;
  result.rank = rank;
  result.size = size;
  result.phase = "computing";
  result.steps = std::move(steps);
  return result;
}

TEST(Divergence, NamesTheRankThatLeftNoDump) {
  const std::vector<RankDump> dumps = {dump(0, {exchange(1, 2, State::waiting)}),
                                       dump(1, {collective(1, "fence", 0)}),
                                       dump(3, {collective(1, "fence", 0)})};
  EXPECT_EQ(first_divergence(dumps).rank, 2);
}

TEST(Divergence, NamesTheRankThatDidNotRun) {
  std::vector<RankDump> dumps;
  for (int rank = 0; rank < 4; ++rank) {
    dumps.push_back(dump(rank, {collective(1, "fence", 0, State::waiting)}));
    dumps.back().paused_ns = rank == 1 ? 2'500'000'000 : 10'000'000;
  }
  EXPECT_EQ(first_divergence(dumps).rank, 1);
}

TEST(Divergence, NamesTheMissingRankThatOthersBlame) {
  std::vector<RankDump> dumps = {dump(1, {collective(1, "fence", 0, State::waiting)}),
                                 dump(3, {collective(1, "fence", 0, State::waiting)})};
  for (RankDump& one : dumps) one.suspect = 2;
  EXPECT_EQ(first_divergence(dumps).rank, 2);
}

TEST(Divergence, NamesTheRankWithAnotherCollective) {
  std::vector<RankDump> dumps;
  for (int rank = 0; rank < 4; ++rank) {
    dumps.push_back(dump(rank, {collective(1, "all_gather", 8),
                                rank == 2 ? collective(2, "split", 0, State::waiting)
                                          : collective(2, "all_gather", 64, State::waiting)}));
  }
  const Divergence found = first_divergence(dumps);
  EXPECT_EQ(found.rank, 2);
  EXPECT_EQ(found.reason,
            "its step 2 is split where ranks 0, 1, 3 did all_gather of 64 bytes, number 2 of their "
            "group");
}

TEST(Divergence, NamesTheEarlierOfTwoDifferences) {
  std::vector<RankDump> dumps;
  for (int rank = 0; rank < 4; ++rank) {
    dumps.push_back(dump(rank, {collective(1, "all_gather", rank == 3 ? 16 : 8),
                                collective(2, "all_gather", rank == 1 ? 16 : 8, State::waiting)}));
  }
  EXPECT_EQ(first_divergence(dumps).rank, 3);
}

TEST(Divergence, NamesTheRankThatWaitsForNobody) {
  std::vector<RankDump> dumps;
  for (int rank = 0; rank < 4; ++rank) {
    dumps.push_back(dump(rank, {collective(1, "all_gather", 8)}));
    if (rank != 1) dumps.back().steps.push_back(collective(2, "fence", 0, State::waiting));
  }
  const Divergence found = first_divergence(dumps);
  EXPECT_EQ(found.rank, 1);
  EXPECT_NE(found.reason.find("waited for by ranks 0, 2, 3"), std::string::npos) << found.reason;
}

TEST(Divergence, NamesTheRankThatWaitsElsewhere) {
  const std::vector<RankDump> dumps = {dump(0, {exchange(1, 1, State::waiting)}, 3),
                                       dump(1, {exchange(1, 2, State::waiting)}, 3),
                                       dump(2, {exchange(1, 1, State::waiting)}, 3)};
  // Ranks 1 and 2 wait for each other; nobody waits for rank 0, so none can be blamed alone.
  EXPECT_EQ(first_divergence(dumps).rank, -1);
  const std::vector<RankDump> chain = {dump(0, {exchange(1, 1, State::waiting)}, 3),
                                       dump(1, {exchange(1, 2, State::waiting)}, 3),
                                       dump(2, {exchange(1, 0, State::waiting)}, 3)};
  EXPECT_EQ(first_divergence(chain).rank, 0);
}

TEST(Divergence, ReadsWhatTheRecorderWrites) {
  std::string folder = (std::filesystem::temp_directory_path() / "annulus-XXXXXX").string();
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  OperationGroup group({0, 5});
  for (int i = 0; i < 100; ++i) const LoggedStep step("all_gather", group, 8);
  ProcessIdentity identity;
  identity.rank = 3;
  identity.size = 4;
  identity.host = "node1";
  identity.dump_folder = folder;
  identify_process(identity);
  operation_log().enter_phase("two words");
  {
    const LoggedStep step("two words", group, std::array{1}, 1000);
    const WaitForStep wait(step);
    EXPECT_TRUE(dump_steps("planted reason"));
  }
  const auto dumps = read_dumps(folder);
  ASSERT_EQ(dumps.size(), 1U);
  EXPECT_EQ(dumps[0].rank, 3);
  EXPECT_EQ(dumps[0].size, 4);
  EXPECT_EQ(dumps[0].host, "node1");
  EXPECT_EQ(dumps[0].reason, "planted reason");
  EXPECT_EQ(dumps[0].phase, "two words");
  EXPECT_GE(dumps[0].steps.size(), 64U);
  ASSERT_NE(dumps[0].waiting(), nullptr);
  EXPECT_EQ(dumps[0].waiting()->name, "two words");
  EXPECT_EQ(dumps[0].waiting()->record.peer[0], 5);
  EXPECT_EQ(dumps[0].waiting()->record.outstanding, 1000);

  std::ofstream(folder + "/rank-000003", std::ios::app) << "no step\n";
  EXPECT_THROW(read_dumps(folder), Error);
  std::filesystem::remove_all(folder);
  EXPECT_THROW(read_dumps(folder), Error);
}

}  // namespace
}  // namespace annulus
