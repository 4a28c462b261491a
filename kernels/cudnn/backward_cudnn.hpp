#pragma once

#include <vector>

#include "kernels/attention.hpp"

namespace annulus::kernels::cudnn {

/// Gradients of any mask of slices: each slice is cut into rectangles that cuDNN can name, and each
/// of them adds its part. That is exact, for the LSE and delta of a row are those of all its keys.
void backward(const BackwardCall& call);

/// Query heads with whole groups, or within one group, and the KV heads that serve them.
struct HeadRun {
  Span q;
  Span kv;
  friend bool operator==(const HeadRun&, const HeadRun&) = default;
};
std::vector<HeadRun> head_runs(const AttentionProblem& problem);

}  // namespace annulus::kernels::cudnn
