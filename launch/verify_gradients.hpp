#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "kernels/mask.hpp"
#include "launch/options.hpp"
#include "runtime/checkpoint.hpp"
#include "runtime/hdf5_file.hpp"
#include "sharding/communicator.hpp"

namespace annulus::launch {

/// dQ, dK and dV of an output beside those recomputed in double.
struct GradientErrors {
  static constexpr std::array<std::string_view, 3> kNames = {"query", "key", "value"};

  /// Norm of the differences over that of the recomputed numbers, or over an eighth of that of
  /// delta's terms in them, where these cancel; -1: not in the output.
  std::array<double, 3> relative = {-1.0, -1.0, -1.0};
  std::array<std::int64_t, 3> rows = {0, 0, 0};
};

/// Recomputes rows of the gradients that `output` has: of dQ from the input alone, of dK and dV,
/// which every query adds to, with the output's own O and LSE. Samples are shared out; every rank
/// gets the whole result. Collective over `ranks`; `alone` is of this rank only. Throws bad_data
/// when a gradient has another shape than its tensor.
GradientErrors compare_gradients(Communicator& ranks, Communicator& alone, const Hdf5File& output,
                                 const Checkpoint& input, const RunOptions& options,
                                 const MaskSlices& mask);

}  // namespace annulus::launch
