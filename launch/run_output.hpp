#pragma once

#include <string>

#include "launch/options.hpp"
#include "launch/report.hpp"
#include "runtime/context.hpp"
#include "runtime/operation_output.hpp"

namespace annulus::launch {

/// What is kept beside the results so that they can be understood and checked later.
struct Provenance {
  bool causal = false;
  std::string input_digest;
  Report report;
};

/// Writes /output: what of `output` and `gradients` is there, each rank its part. Collective.
void write_output(Context& context, const RunOptions& options, const OperationOutput& output,
                  const OperationGradients& gradients, const Provenance& provenance);

}  // namespace annulus::launch
