#include "launch/input_digest.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/agreement.hpp"

namespace annulus::launch {
namespace {

constexpr std::int64_t kBlockBytes = std::int64_t{1} << 20;
constexpr std::int64_t kMaxBlocks = 256;

// The finaliser of splitmix64: every bit of the input moves every bit of the result.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

std::uint64_t digest_of(std::span<const char> block, std::uint64_t seed) {
  std::uint64_t state = mix(seed + 0x9e3779b97f4a7c15U);
  for (std::size_t at = 0; at < block.size(); at += sizeof state) {
    std::uint64_t word = 0;
    std::memcpy(&word, block.data() + at, std::min(sizeof word, block.size() - at));
    state = mix(state ^ word) + at;
  }
  return state;
}

// Sum over the blocks of this rank: the order, and so the number of ranks, does not matter.
std::uint64_t digest_of_share(const std::string& path, std::int64_t bytes, int rank, int ranks) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> block(static_cast<std::size_t>(kBlockBytes));
  const std::int64_t blocks = std::max<std::int64_t>(1, (bytes + kBlockBytes - 1) / kBlockBytes);
  const std::int64_t taken = std::min(blocks, kMaxBlocks);
  std::uint64_t sum = 0;
  for (std::int64_t i = rank; i < taken; i += ranks) {
    const std::int64_t which = taken == 1 ? 0 : i * (blocks - 1) / (taken - 1);
    const std::int64_t begin = which * kBlockBytes;
    const std::int64_t length = std::min(kBlockBytes, bytes - begin);
    file.seekg(begin);
    file.read(block.data(), length);
    require(file.good(), ExitCode::io, "run: {}: cannot read {} bytes at {}", path, length, begin);
    sum += digest_of(std::span(block).first(static_cast<std::size_t>(length)),
                     static_cast<std::uint64_t>(begin));
  }
  return sum;
}

}  // namespace

std::string input_digest(Communicator& communicator, const std::string& path) {
  std::uint64_t mine = 0;
  agree(communicator, [&] {
    const auto bytes = static_cast<std::int64_t>(std::filesystem::file_size(path));
    mine = digest_of_share(path, bytes, communicator.rank(), communicator.size());
    if (communicator.rank() == 0) mine += mix(static_cast<std::uint64_t>(bytes));
  });
  std::vector<std::uint64_t> all(static_cast<std::size_t>(communicator.size()));
  communicator.all_gather(std::as_bytes(std::span(&mine, 1)),
                          std::as_writable_bytes(std::span(all)));
  std::uint64_t sum = 0;
  for (const std::uint64_t part : all) sum += part;
  return fmt::format("blocks-{}:{:016x}", kMaxBlocks, sum);
}

}  // namespace annulus::launch
