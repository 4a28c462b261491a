#pragma once

#include "kernels/attention.hpp"

namespace annulus::kernels::cpu {

/// Whether a forward call has too few rows to fill threads or lanes: then the keys are split into
/// parts of a fixed length, whatever the number of threads, so that the bits do not depend on it.
bool splits_keys(const AttentionProblem& problem);

/// Computes a part of the keys to a task and merges the states in order.
void split_forward(const ForwardCall& call);

}  // namespace annulus::kernels::cpu
