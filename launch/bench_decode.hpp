#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "launch/bench_row.hpp"
#include "launch/commands.hpp"

namespace annulus::launch {

struct DecodeShape {
  std::int64_t batch = 1;
  std::int64_t seq = 65536;  // tokens of the cache of each sequence
};

/// One query token of each sequence against its cache.
struct DecodeBenchOptions {
  std::vector<DecodeShape> shapes;
  std::vector<std::string> caches{"contiguous", "paged", "mla"};
  std::int64_t heads = 32;
  std::int64_t kv_heads = 8;
  std::int64_t head_dim = 128;
  std::int64_t page_size = 16;   // of "paged" and "mla"
  std::int64_t mla_heads = 128;  // one KV head of 512 + 64 columns
  std::string dtype = "bf16";
  int repeats = 7;
};

/// `annulus bench decode`: decode over contiguous, paged and latent caches, beside the rate of
/// reading (or, on a device, copying) memory in the same run. Over several ranks the cache is dealt
/// to them, and the time includes the exchange.
void bench_decode(Arguments arguments);

/// Rows on the current device; GB/s count the bytes of the cache, read once.
std::vector<BenchRow> bench_cuda_decode(const DecodeBenchOptions& options);

}  // namespace annulus::launch
