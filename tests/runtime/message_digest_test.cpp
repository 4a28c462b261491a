#include "runtime/message_digest.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <set>
#include <vector>

namespace annulus::testing {
namespace {

std::uint64_t digest_of(const std::vector<unsigned char>& bytes) {
  return message_digest(bytes.data(), static_cast<std::int64_t>(bytes.size()));
}

std::vector<unsigned char> random_bytes(std::size_t size) {
  std::mt19937 random(static_cast<unsigned>(size) + 7);
  std::vector<unsigned char> bytes(size);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
  return bytes;
}

TEST(MessageDigest, AnyFlippedBitChangesIt) {
  for (const std::size_t size : {1U, 7U, 8U, 63U, 64U, 65U, 200U, 1000U}) {
    std::vector<unsigned char> bytes = random_bytes(size);
    const std::uint64_t right = digest_of(bytes);
    for (std::size_t bit = 0; bit < size * 8; ++bit) {
      const auto mask = static_cast<unsigned char>(1U << bit % 8);
      bytes[bit / 8] = static_cast<unsigned char>(bytes[bit / 8] ^ mask);
      EXPECT_NE(digest_of(bytes), right) << "bit " << bit << " of " << size << " bytes";
      bytes[bit / 8] = static_cast<unsigned char>(bytes[bit / 8] ^ mask);
    }
    EXPECT_EQ(digest_of(bytes), right);
  }
}

TEST(MessageDigest, LengthAndOrderChangeIt) {
  std::set<std::uint64_t> found;
  for (std::size_t size = 0; size <= 300; ++size) {
    found.insert(digest_of(std::vector<unsigned char>(size)));
  }
  EXPECT_EQ(found.size(), 301U);
  std::vector<unsigned char> bytes = random_bytes(640);
  const std::uint64_t right = digest_of(bytes);
  for (std::size_t block = 0; block < 9; ++block) {
    std::vector<unsigned char> swapped = bytes;
    std::swap_ranges(swapped.begin() + static_cast<std::ptrdiff_t>(block * 64),
                     swapped.begin() + static_cast<std::ptrdiff_t>(block * 64 + 64),
                     swapped.begin() + static_cast<std::ptrdiff_t>(block * 64 + 64));
    EXPECT_NE(digest_of(swapped), right) << block;
  }
}

}  // namespace
}  // namespace annulus::testing
