#pragma once

#include <string_view>

#include "kernels/attention.hpp"
#include "runtime/attention_operation.hpp"

namespace annulus {

/// The kernels' backend that a call of `operation` names: that of its tuning, on a device `cudnn`
/// where metadata.backend asks for it, or where the operation prefers it and it serves `problem`;
/// else empty, the first that serves it. Lives as long as the operation.
std::string_view kernel_of(const AttentionOperation& operation, Device device,
                           const AttentionProblem& problem, Direction direction);

}  // namespace annulus
