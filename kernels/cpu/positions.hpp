#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "kernels/attention.hpp"

namespace annulus::kernels {

/// The global position of a local row; no runs: the same.
inline std::int64_t global_position(std::span<const PositionRun> runs, std::int64_t local) {
  if (runs.empty()) return local;
  const auto after = std::upper_bound(
      runs.begin(), runs.end(), local,
      [](std::int64_t row, const PositionRun& run) { return row < run.local_begin; });
  const PositionRun& run = *(after - 1);
  return run.global_begin + (local - run.local_begin);
}

}  // namespace annulus::kernels
