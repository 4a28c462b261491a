#pragma once

#include <string>

#include "kernels/attention.hpp"

namespace annulus::kernels::cpu {

/// The vector backend: FlashAttention tiles on whatever vectors the processor has (Highway),
/// OpenMP threads, f32 arithmetic. Where there is a tile unit (AMX) it has the products: of bf16 with
/// weights rounded to bf16, of f32 and f16 as sums of parts that keep the accuracy of f32. Rows come out with the same bits for any number of threads.
std::string unsupported(const AttentionProblem& problem, Direction direction);
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace annulus::kernels::cpu
