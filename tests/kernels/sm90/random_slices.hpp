#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/mask.hpp"

namespace annulus {

/// Bottom-right causal.
std::vector<Slice> causal_slices(std::int64_t seq_q, std::int64_t seq_kv);

/// One of: everything, causal, a window, rows without keys, a corner, several slices over a key,
/// documents with padding behind them.
std::vector<Slice> random_slices(std::mt19937& random, std::int64_t seq_q, std::int64_t seq_kv);

}  // namespace annulus
