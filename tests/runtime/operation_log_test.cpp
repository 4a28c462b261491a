#include "runtime/operation_log.hpp"

#include <gtest/gtest.h>

#include <stdexcept>
#include <thread>

namespace annulus {
namespace {

TEST(OperationLog, KeepsAtLeastTheLast64Steps) {
  static_assert(OperationLog::kKept >= 64);
  OperationLog log;
  for (std::int64_t i = 1; i <= 1000; ++i) EXPECT_EQ(log.begin("step", nullptr, {}, i), i);
  EXPECT_FALSE(log.step(1000 - OperationLog::kKept));
  for (std::int64_t i = 1000 - OperationLog::kKept + 1; i <= 1000; ++i) {
    ASSERT_TRUE(log.step(i));
    EXPECT_EQ(log.step(i)->bytes, i);
  }
  EXPECT_FALSE(log.step(1001));
  EXPECT_FALSE(log.step(0));
}

TEST(OperationLog, ShowsTheStepThatIsWaitedForAndItsBytes) {
  OperationGroup group({4, 7, 9});
  const LoggedStep outer("exchange", group, std::array{1, 2, 1}, 100);
  EXPECT_FALSE(operation_log().waiting());
  {
    const WaitForStep wait(outer);
    LoggedStep& moving = const_cast<LoggedStep&>(outer);
    moving.moved(30);
    const auto step = operation_log().waiting();
    ASSERT_TRUE(step);
    EXPECT_EQ(step->name, "exchange");
    EXPECT_EQ(step->peers, 2);
    EXPECT_EQ(step->peer[0], 7);
    EXPECT_EQ(step->peer[1], 9);
    EXPECT_EQ(step->peer[2], -1);
    EXPECT_EQ(step->bytes, 100);
    EXPECT_EQ(step->outstanding, 70);
    EXPECT_EQ(step->state, StepRecord::State::waiting);
    const WaitingStep inner("fence", group, 0);
    EXPECT_EQ(operation_log().waiting()->name, "fence");
  }
  EXPECT_FALSE(operation_log().waiting());
}

TEST(OperationLog, CountsCollectiveStepsOfAGroup) {
  OperationGroup group({0, 1});
  std::int64_t number = 0;
  for (int i = 1; i <= 3; ++i) {
    const LoggedStep step("all_gather", group, 8);
    number = step.number();
    EXPECT_EQ(operation_log().step(number)->group_number, i);
  }
  EXPECT_EQ(operation_log().step(number)->state, StepRecord::State::done);
}

TEST(OperationLog, GroupsOfTheSameRanksDifferAndRepeatAlike) {
  const OperationGroup first({0, 2});
  const OperationGroup second({0, 2});
  const OperationGroup other({2, 0});
  EXPECT_NE(first.id(), second.id());
  EXPECT_NE(first.id(), other.id());
  EXPECT_EQ(operation_log().members(first.id()), (std::vector<int>{0, 2}));
  std::uint64_t gone = 0;
  {
    const OperationGroup group({5});
    gone = group.id();
  }
  EXPECT_TRUE(operation_log().members(gone).empty());
}

TEST(OperationLog, AnExceptionMarksTheStepAsFailed) {
  OperationGroup group({0, 1});
  std::int64_t number = 0;
  try {
    const LoggedStep step("split", group, 8);
    number = step.number();
    throw std::runtime_error("planted");
  } catch (const std::runtime_error&) {
  }
  EXPECT_EQ(operation_log().step(number)->state, StepRecord::State::failed);
  EXPECT_EQ(operation_log().step(number)->outstanding, 8);
}

TEST(OperationLog, AReaderNeverSeesAHalfWrittenStep) {
  OperationLog log;
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    std::int64_t i = 0;
    while (!stop) {
      ++i;
      log.begin(i % 2 == 0 ? "even" : "odd numbers", nullptr, {}, i);
    }
  });
  for (int i = 0; i < 100000; ++i) {
    const auto step = log.last();
    if (!step) continue;
    ASSERT_EQ(step->bytes, step->number);
    ASSERT_EQ(step->name, step->number % 2 == 0 ? "even" : "odd numbers");
  }
  stop = true;
  writer.join();
}

}  // namespace
}  // namespace annulus
