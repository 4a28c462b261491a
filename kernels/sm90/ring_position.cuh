#pragma once

#include "kernels/sm90/forward_tile.cuh"

namespace annulus::kernels::sm90 {

/// Position in a ring of barriers by one number, for loops that are short of registers.
template <int kSize>
struct TurnCount {
  static_assert((kSize & (kSize - 1)) == 0);
  unsigned turns = 0;

  __device__ unsigned index() const { return turns % kSize; }
  __device__ std::uint32_t parity() const { return turns / kSize % 2; }
  __device__ TurnCount before() const { return {turns - 1}; }
  __device__ void advance() { ++turns; }
};

/// The same, ready to use.
template <int kSize>
struct TurnPlace {
  Ring<kSize> ring;

  __device__ int index() const { return ring.index; }
  __device__ std::uint32_t parity() const { return ring.parity; }
  __device__ void advance() { ring.advance(); }
};

}  // namespace annulus::kernels::sm90
