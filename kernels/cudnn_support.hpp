#pragma once

#include <span>

#include "kernels/attention.hpp"

/// The vendor library's attention; no_cudnn.cpp stands in for it in a build without cuDNN.
namespace annulus::kernels::cudnn {

/// Empty without cuDNN. Forward: f16 and bf16, one band over all queries and keys, GQA in whole
/// groups, bias, sinks. No carried state: its output is rounded to 16 bits.
std::span<const AttentionBackend> backends();

/// cuDNN's version as text; empty without cuDNN.
const char* version();

}  // namespace annulus::kernels::cudnn
