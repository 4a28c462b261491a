#pragma once

#include <cuda_runtime.h>

#include <span>

#include "kernels/decode_attention.hpp"
#include "kernels/sm90/decode_params.hpp"

/// From a decode call to a launch: tensor maps, parameters, scratch memory.
namespace annulus::kernels::sm90 {

/// A compiled tile shape.
struct DecodeVariant {
  int block;       // keys at a time
  int stages;      // of the rings
  int few_stages;  // the same where boxes are small
  int k_columns;   // of a box in shared memory
  int v_columns;
  int value_dim;
  void (*launch)(const DecodeParams& params, int blocks, cudaStream_t stream);
};

DecodeVariant decode_d64(DType dtype);
DecodeVariant decode_d96(DType dtype);
DecodeVariant decode_d128(DType dtype);
DecodeVariant decode_d128_gathered(DType dtype);
DecodeVariant decode_d192(DType dtype);
DecodeVariant decode_d256(DType dtype);
/// Keys of 512 latent and 64 rotary columns, the latent ones being the values.
DecodeVariant decode_latent(DType dtype);

/// Whether pages hold no whole groups of the eight rows that shared memory is swizzled in: their
/// tokens are then gathered one by one. A sequence of one page is read from any token on.
bool gathers_tokens(const DecodeProblem& problem);

void launch_decode(const DecodeCall& call, const DecodeVariant& variant);

/// The Hopper backend of decode_attention; its reasons for refusing name what it was given and what
/// it takes.
std::span<const DecodeBackend> decode_backends();

}  // namespace annulus::kernels::sm90
