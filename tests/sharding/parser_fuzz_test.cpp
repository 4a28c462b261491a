// Mesh and spec parsers meet anything: each text either reads as a value that prints and reads back
// to itself, or is refused with one printable line.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <string>

#include "kernels/error.hpp"
#include "sharding/mesh.hpp"
#include "sharding/partition_spec.hpp"
#include "tests/sharding/random_layout.hpp"

namespace annulus {
namespace {

constexpr int kTexts = 60'000;

constexpr std::array<std::string_view, 34> kWords = {
    "sp", "tp",           "dp",         "fsdp",        "ep",  "=",  ",",       "(",  ")",
    "-",  "-1",           "1",          "2",           "4",   "0",  "none",    " ",  "\t",
    "\n", "2147483647",   "4294967296", "-2147483648", "_",   "a1", "1a",      "==", "((",
    "))", "\xe2\x80\x93", "0x4",        "+2",          "1e1", "",   "nonesuch"};

/// Words of both grammars in any order.
std::string random_words(std::mt19937_64& random) {
  std::string text;
  const std::size_t words = random() % 14;
  for (std::size_t i = 0; i < words; ++i) text += kWords[random() % kWords.size()];
  return text;
}

/// Any bytes, zeros included.
std::string random_bytes(std::mt19937_64& random) {
  std::string text(random() % 24, '\0');
  for (char& c : text) c = static_cast<char>(random() % 256);
  return text;
}

/// A right text with one byte changed, taken out or put in.
std::string nearly(std::string text, std::mt19937_64& random) {
  const std::size_t at = random() % text.size();
  const auto byte = static_cast<char>(random() % 256);
  switch (random() % 4) {
    case 0:
      return text;
    case 1:
      text[at] = byte;
      return text;
    case 2:
      return text.erase(at, 1);
    default:
      return text.insert(at, 1, byte);
  }
}

std::string random_text(std::string_view right, std::mt19937_64& random) {
  switch (random() % 3) {
    case 0:
      return random_words(random);
    case 1:
      return random_bytes(random);
    default:
      return nearly(std::string(right), random);
  }
}

/// Reads one text; true if it was accepted.
template <typename Read>
bool reads_or_refuses(const std::string& text, const Read& read) {
  try {
    const auto value = read(text);
    EXPECT_EQ(read(value.to_string()), value);
    return true;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    const std::string_view line = error.what();
    EXPECT_LT(line.size(), 600U);
    EXPECT_TRUE(std::none_of(line.begin(), line.end(), [](unsigned char c) {
      return c < 0x20 || c == 0x7F;
    })) << line;
    return false;
  }
}

/// Most random texts are wrong, yet some must get through, or the test shows nothing.
template <typename Read>
void fuzz(std::string_view right, const Read& read) {
  const std::uint64_t seed = testing::fresh_seed();
  std::mt19937_64 random(seed);
  int accepted = 0;
  for (int i = 0; i < kTexts; ++i) {
    const std::string text = random_text(right, random);
    SCOPED_TRACE(fmt::format("seed {} text {}: '{}'", seed, i, printable(text)));
    accepted += reads_or_refuses(text, read) ? 1 : 0;
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GT(accepted, kTexts / 50);
  EXPECT_LT(accepted, kTexts / 2);
}

TEST(ParserFuzz, Mesh) {
  fuzz("sp=4,tp=2", [](std::string_view text) { return Mesh::parse(text, 8); });
}

TEST(ParserFuzz, PartitionSpec) {
  fuzz("((fsdp,dp), sp, tp, -)", [](std::string_view text) { return PartitionSpec::parse(text); });
}

TEST(ParserFuzz, LongTextsEndInShortMessages) {
  for (const char c : {'(', 's', ',', '=', '-', '9', ' ', '\0'}) {
    const std::string text(1'000'000, c);
    reads_or_refuses(text, [](std::string_view t) { return Mesh::parse(t, 8); });
    const auto read = [](std::string_view t) { return PartitionSpec::parse(t); };
    EXPECT_FALSE(reads_or_refuses(text, read));
    EXPECT_FALSE(reads_or_refuses("(" + text, read));
  }
}

}  // namespace
}  // namespace annulus
