#pragma once

#include <array>
#include <cstdint>

namespace annulus {

/// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                           std::uint64_t seed) {
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ULL * counter[0];
    const std::uint64_t b = 0xCD9E8D57ULL * counter[2];
    counter = {
        static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(a)};
    key0 += 0x9E3779B9U;
    key1 += 0xBB67AE85U;
  }
  return counter;
}

/// A probability as the largest 32-bit word that is dropped, plus one.
inline std::uint32_t dropout_threshold(float probability) {
  return static_cast<std::uint32_t>(static_cast<double>(probability) * 4294967296.0);
}

/// Whether dropout keeps one element. The counter is (key / 4, query, head, batch) in global
/// indices and the key picks one of the four words, so that a vector kernel draws four keys at
/// once.
inline bool dropout_keeps(std::uint64_t seed, std::uint32_t threshold, std::int64_t batch,
                          std::int64_t head, std::int64_t q, std::int64_t k) {
  const std::array<std::uint32_t, 4> words =
      philox({static_cast<std::uint32_t>(k >> 2), static_cast<std::uint32_t>(q),
              static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(batch)},
             seed);
  return words[static_cast<std::size_t>(k & 3)] >= threshold;
}

}  // namespace annulus
