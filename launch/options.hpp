#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/types.hpp"
#include "launch/commands.hpp"
#include "runtime/checkpoint.hpp"

namespace annulus::launch {

/// What `annulus run` was asked for.
struct RunOptions {
  std::string operation;
  std::string mesh;
  CheckpointRequest input;
  std::string output;  // empty: nothing is written

  std::optional<bool> causal;  // none: the operation's own default
  std::array<std::int64_t, 2> window = {-1, -1};
  float soft_cap = 0.0F;
  std::optional<float> scale;
  float dropout = 0.0F;
  std::uint64_t seed = 0;

  std::optional<DType> dtype;
  std::optional<DType> output_dtype;
  std::string layout = "contiguous";
  std::string backend;  // empty: the mesh's
  std::string transport = "auto";

  bool backward = false;
  bool weights = false;
  bool reproducible = false;
  bool check_finite = false;
  double timeout_seconds = 30.0;
  std::string trace;
  std::string rates;  // that auto goes by
  bool json = false;
  bool force = false;

  /// The options that were given, in the form that --config reads.
  std::string text;
};

/// None when help was asked for and printed. Throws usage.
std::optional<RunOptions> parse_run_options(Arguments arguments);

/// The options that `text` of an earlier run holds.
RunOptions restore_run_options(std::string_view text);

/// What `annulus verify` was asked for.
struct VerifyOptions {
  std::string output;
  std::string input;
  bool json = false;
};

std::optional<VerifyOptions> parse_verify_options(Arguments arguments);

}  // namespace annulus::launch
