#pragma once

#include <span>

#include "kernels/decode_attention.hpp"

namespace annulus::kernels::cuda {

/// Decode backends for device tensors, in order of preference; none in a build without CUDA.
std::span<const DecodeBackend> decode_backends();
/// append_to_cache() for device tensors.
void append_to_cache(const CacheAppend& call);

}  // namespace annulus::kernels::cuda

namespace annulus::kernels::reference {

/// Plain loops in double: the specification of decode, and its oracle.
std::string decode_unsupported(const DecodeProblem& problem);
void decode_forward(const DecodeCall& call);

}  // namespace annulus::kernels::reference
