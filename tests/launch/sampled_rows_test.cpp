#include "launch/sampled_rows.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

namespace annulus::launch {
namespace {

TEST(SampleRows, TakesAllRowsWhereTheyAreFew) {
  const std::vector<RowSample> samples = sample_rows({2, 5, 3, 4}, {7 * 8, 1e9, 64, 1});
  ASSERT_EQ(samples.size(), 6U);
  std::set<std::pair<std::int64_t, std::int64_t>> pairs;
  for (const RowSample& sample : samples) {
    EXPECT_EQ(sample.rows, (std::vector<std::int64_t>{0, 1, 2, 3, 4}));
    pairs.insert({sample.batch, sample.head});
  }
  EXPECT_EQ(pairs.size(), 6U);
}

TEST(SampleRows, StaysWithinTheWorkAndKeepsBothEnds) {
  const std::vector<RowSample> samples =
      sample_rows({8, 100000, 64, 128}, {100000.0 * 256.0, 1e10, 64, 1});
  EXPECT_EQ(samples.size(), 64U);
  double work = 0.0;
  for (const RowSample& sample : samples) {
    EXPECT_EQ(sample.rows.front(), 0);
    EXPECT_EQ(sample.rows.back(), 99999);
    EXPECT_TRUE(std::is_sorted(sample.rows.begin(), sample.rows.end()));
    work += static_cast<double>(sample.rows.size()) * 100000.0 * 256.0;
  }
  EXPECT_LE(work, 1e10 + 64 * 100000.0 * 256.0);
}

TEST(SampleRows, NoRowsAreNoRows) {
  for (const RowSample& sample : sample_rows({1, 0, 2, 4}, {24, 1e6, 64, 1})) {
    EXPECT_TRUE(sample.rows.empty());
  }
}

}  // namespace
}  // namespace annulus::launch
