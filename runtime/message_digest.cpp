#include "runtime/message_digest.hpp"

#include <array>
#include <cstddef>
#include <cstring>

namespace annulus {
namespace {

constexpr std::size_t kLanes = 8;
constexpr std::size_t kBlock = kLanes * sizeof(std::uint64_t);

// The finaliser of splitmix64: every bit of the input moves every bit of the result.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

struct Lanes {
  std::array<std::uint64_t, kLanes> sum{};
  std::array<std::uint64_t, kLanes> sum_of_sums{};

  void add(const unsigned char* block) {
    std::array<std::uint64_t, kLanes> words;
    std::memcpy(words.data(), block, kBlock);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      sum[lane] += words[lane];
      sum_of_sums[lane] += sum[lane];
    }
  }
};

}  // namespace

std::uint64_t message_digest(const void* data, std::int64_t bytes) {
  const auto* from = static_cast<const unsigned char*>(data);
  const auto size = static_cast<std::size_t>(bytes);
  Lanes lanes;
  std::size_t at = 0;
  for (; at + kBlock <= size; at += kBlock) lanes.add(from + at);
  if (at < size) {
    std::array<unsigned char, kBlock> rest{};
    std::memcpy(rest.data(), from + at, size - at);
    lanes.add(rest.data());
  }
  std::uint64_t digest = mix(size + 0x9e3779b97f4a7c15U);
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    digest = mix(digest ^ lanes.sum[lane]);
    digest = mix(digest ^ lanes.sum_of_sums[lane]);
  }
  return digest;
}

}  // namespace annulus
