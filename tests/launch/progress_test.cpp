#include "launch/progress.hpp"

#include <gtest/gtest.h>

namespace annulus::launch {
namespace {

TEST(Progress, ShowsTheTimeWhereNothingIsCounted) {
  EXPECT_EQ(progress_text("reading", 0.0, 12.4), "reading, 12 s");
}

TEST(Progress, ShowsTheShareAndTheTimeLeft) {
  EXPECT_EQ(progress_text("computing", 0.5, 10.0),
            "computing [###############...............]  50%, 10 s left");
  EXPECT_EQ(progress_text("computing", 0.25, 3.0),
            "computing [#######.......................]  25%, 9 s left");
}

TEST(Progress, NeverPassesTheEnd) {
  EXPECT_EQ(progress_text("computing", 1.7, 10.0),
            "computing [##############################] 100%, 0 s left");
}

}  // namespace
}  // namespace annulus::launch
