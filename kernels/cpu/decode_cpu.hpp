#pragma once

#include <string>

#include "kernels/decode_attention.hpp"

namespace annulus::kernels::cpu {

/// The vector form of decode: tokens of a cache are split into parts of a length that depends on
/// the problem alone, so that the bits do not depend on the number of threads.
std::string decode_unsupported(const DecodeProblem& problem);
void decode_forward(const DecodeCall& call);

}  // namespace annulus::kernels::cpu
