#include "runtime/watched_peers.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <set>

namespace annulus {
namespace {

constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kTimeout = 8 * kSecond;

RankAnswer working(std::int64_t idle_ns) {
  RankAnswer answer;
  answer.idle_ns = idle_ns;
  return answer;
}

RankAnswer waiting(std::int64_t idle_ns, int suspect) {
  RankAnswer answer = working(idle_ns);
  answer.waiting = 1;
  answer.suspect = suspect;
  return answer;
}

/// Asks and answers every second, each rank by `answer_of(rank, now)`; a silent one gives none.
template <typename AnswerOf>
std::int64_t seconds_until_hopeless(WatchedPeers& watch, std::int64_t limit, AnswerOf answer_of) {
  for (std::int64_t now = 0; now <= limit * kSecond; now += kSecond / 4) {
    for (const int peer : watch.to_ask(now)) {
      watch.asked(peer, now);
      if (const auto answer = answer_of(peer, now)) watch.answered(peer, *answer, now);
    }
    if (watch.idle_ns(now, now) > kTimeout) return now / kSecond;
  }
  return limit;
}

TEST(WatchedPeers, AsksNobodyInAShortWait) {
  WatchedPeers watch(kTimeout);
  watch.wait_for(1, std::array{3}, 0);
  EXPECT_TRUE(watch.to_ask(kTimeout / 8 - 1).empty());
  EXPECT_EQ(watch.to_ask(kTimeout / 8), std::vector<int>{3});
  watch.asked(3, kTimeout / 8);
  EXPECT_TRUE(watch.to_ask(kTimeout).empty()) << "one question is on its way";
}

TEST(WatchedPeers, AComputingPeerJustifiesAnyWait) {
  WatchedPeers watch(kTimeout);
  watch.wait_for(1, std::array{3}, 0);
  EXPECT_EQ(seconds_until_hopeless(watch, 1000,
                                   [](int, std::int64_t) { return std::optional(working(0)); }),
            1000);
}

TEST(WatchedPeers, ASilentPeerEndsTheWaitAfterOneDeadline) {
  WatchedPeers watch(kTimeout);
  watch.wait_for(1, std::array{3, 5}, 0);
  const auto answer = [](int peer, std::int64_t) {
    return peer == 5 ? std::nullopt : std::optional(waiting(0, 5));
  };
  EXPECT_EQ(seconds_until_hopeless(watch, 1000, answer), 8);
  const auto suspect = watch.suspect(kTimeout);
  EXPECT_EQ(suspect.rank, 5);
  EXPECT_TRUE(suspect.silent);
  EXPECT_FALSE(suspect.ever_heard);
}

TEST(WatchedPeers, TheDeadlineRunsFromTheLastSignOfLife) {
  WatchedPeers watch(kTimeout);
  watch.wait_for(1, std::array{3}, 0);
  const auto answer = [](int, std::int64_t now) {
    return now < 100 * kSecond ? std::optional(working(0)) : std::nullopt;
  };
  const std::int64_t end = seconds_until_hopeless(watch, 1000, answer);
  EXPECT_GE(end, 107);
  EXPECT_LE(end, 109);
}

TEST(WatchedPeers, BlamesTheRankBehindThePeer) {
  WatchedPeers watch(kTimeout);
  watch.wait_for(1, std::array{3}, 0);
  const auto answer = [](int, std::int64_t now) { return std::optional(waiting(now, 9)); };
  EXPECT_EQ(seconds_until_hopeless(watch, 1000, answer), 8);
  const auto suspect = watch.suspect(kTimeout);
  EXPECT_EQ(suspect.rank, 9);
  EXPECT_EQ(suspect.through, 3);
}

TEST(WatchedPeers, ANewStepHasANewDeadline) {
  WatchedPeers watch(kTimeout);
  watch.wait_for(1, std::array{3}, 0);
  watch.asked(3, kSecond);
  watch.wait_for(2, std::array{3}, 7 * kSecond);
  EXPECT_EQ(watch.idle_ns(2 * kSecond, 9 * kSecond), 2 * kSecond);
}

TEST(WatchedPeers, EveryRankIsWatchedInAGroupOfAnySize) {
  for (const int size : {1, 2, 3, 32, 33, 100}) {
    std::vector<int> members(static_cast<std::size_t>(size));
    std::iota(members.begin(), members.end(), 10);
    std::multiset<int> watched;
    for (const int rank : members) {
      const auto asked = ranks_to_watch(members, rank);
      EXPECT_LE(asked.size(), 32U);
      EXPECT_EQ(std::count(asked.begin(), asked.end(), rank), 0);
      watched.insert(asked.begin(), asked.end());
    }
    for (const int rank : members) {
      EXPECT_EQ(static_cast<int>(watched.count(rank)), std::min(32, size - 1));
    }
  }
}

}  // namespace
}  // namespace annulus
