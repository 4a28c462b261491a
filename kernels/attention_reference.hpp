#pragma once

#include "kernels/attention.hpp"

namespace annulus::kernels::reference {

/// Plain loops in double over host tensors of any floating dtype: the specification, the oracle of
/// the tests, and the backend of last resort.
std::string unsupported(const AttentionProblem& problem, Direction direction);
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace annulus::kernels::reference
