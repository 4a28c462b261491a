#include "launch/input_digest.hpp"

#include <gtest/gtest.h>

#include <string>

#include "launch/program.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus::launch {
namespace {

std::string digest(int ranks, const std::string& path) {
  std::string result;
  annulus::testing::run_ranks(ranks, [&](Communicator& communicator) {
    const std::string mine = input_digest(communicator, path);
    if (communicator.rank() == 0) result = mine;
  });
  return result;
}

TEST(InputDigest, IsTheSameForAnyNumberOfRanksAndSeesEveryByte) {
  const annulus::testing::TemporaryFolder folder;
  const std::string path = folder.file("data");
  std::string text(3 * (1 << 20) + 5, 'a');
  annulus::testing::write_text(path, text);
  const std::string whole = digest(1, path);
  for (const int ranks : {2, 3, 5}) EXPECT_EQ(digest(ranks, path), whole);
  for (const std::size_t at : {std::size_t{0}, std::size_t{1} << 20, text.size() - 1}) {
    std::string changed = text;
    changed[at] = 'b';
    annulus::testing::write_text(path, changed);
    EXPECT_NE(digest(2, path), whole) << at;
  }
  annulus::testing::write_text(path, text + "a");
  EXPECT_NE(digest(2, path), whole);
  annulus::testing::write_text(path, "");
  EXPECT_EQ(digest(2, path), digest(1, path));
}

}  // namespace
}  // namespace annulus::launch
