#pragma once

#include <cuda_runtime.h>


#include "kernels/cudnn/graph.hpp"

namespace annulus::kernels::cudnn {

/// All that a compiled plan depends on: the key of the cache.
struct SdpaDescriptor {
  int device = 0;
  DType dtype = DType::bf16;
  TensorLayout q;
  TensorLayout k;
  TensorLayout v;
  TensorLayout o;
  TensorLayout bias;
  TensorLayout stats;
  bool sinks = false;
  BandForm band;
  float scale = 1.0F;

  friend auto operator<=>(const SdpaDescriptor&, const SdpaDescriptor&) = default;
};

/// Device memory of one call.
struct SdpaPointers {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* bias = nullptr;
  const void* sinks = nullptr;
  void* o = nullptr;
  void* stats = nullptr;  // natural-log LSE, f32
};

void run_sdpa(const SdpaDescriptor& descriptor, const SdpaPointers& pointers, cudaStream_t stream);

/// The same for the backward graph, which recomputes P from the LSE and delta from O.
struct SdpaGradientDescriptor {
  int device = 0;
  DType dtype = DType::bf16;
  TensorLayout q;
  TensorLayout k;
  TensorLayout v;
  TensorLayout o;
  TensorLayout grad_o;
  TensorLayout stats;
  TensorLayout grad_q;
  TensorLayout grad_k;
  TensorLayout grad_v;
  BandForm band;
  float scale = 1.0F;
  bool deterministic = false;

  friend auto operator<=>(const SdpaGradientDescriptor&, const SdpaGradientDescriptor&) = default;
};

struct SdpaGradientPointers {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* o = nullptr;
  const void* grad_o = nullptr;
  const void* stats = nullptr;
  /// Gradients are written, not added to, in the input's dtype: for f32 cuDNN 9 makes a plan that
  /// writes something else.
  void* grad_q = nullptr;
  void* grad_k = nullptr;
  void* grad_v = nullptr;
};

void run_sdpa_gradient(const SdpaGradientDescriptor& descriptor,
                       const SdpaGradientPointers& pointers, cudaStream_t stream);

}  // namespace annulus::kernels::cudnn
