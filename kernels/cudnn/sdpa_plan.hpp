#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <string>

#include "kernels/types.hpp"

namespace annulus::kernels::cudnn {

/// A tensor of the graph as [batch, heads, seq, dim]; all zero: absent.
struct TensorLayout {
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> strides{};

  bool present() const { return shape[1] != 0; }
  friend auto operator<=>(const TensorLayout&, const TensorLayout&) = default;
};

enum class Diagonal : std::uint8_t { none, top_left, bottom_right };

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
  bool causal = false;
  Diagonal diagonal = Diagonal::none;  // where bounds are measured from
  std::int64_t left_bound = 0;         // keys up to this many before the diagonal, 0: unbounded
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

/// Why cuDNN cannot run it; empty when it can. Builds the plan (about 0.5 s) on first use of a
/// descriptor by this process.
std::string sdpa_refusal(const SdpaDescriptor& descriptor);
void run_sdpa(const SdpaDescriptor& descriptor, const SdpaPointers& pointers, cudaStream_t stream);

}  // namespace annulus::kernels::cudnn
