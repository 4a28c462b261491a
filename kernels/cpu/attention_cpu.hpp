#pragma once

#include <string>

#include "kernels/attention.hpp"

namespace annulus::kernels::cpu {

/// The vector backend: FlashAttention tiles on whatever vectors the processor has (Highway),
/// OpenMP threads, f32 arithmetic; products of bf16 inputs on the tile unit (AMX) where there is
/// one, with weights rounded to bf16. Rows come out with the same bits for any number of threads.
std::string unsupported(const AttentionProblem& problem, Direction direction);
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace annulus::kernels::cpu
