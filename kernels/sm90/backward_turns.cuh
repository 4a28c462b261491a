#pragma once

#include <cstdint>

#include "kernels/sm90/tma.cuh"

/// Deterministic mode: words of global memory that say whose turn it is to add to rows of dQ.
namespace annulus::kernels::sm90 {

/// What was added before the turn was passed on is visible behind it.
__device__ inline std::uint32_t current_turn(const std::uint32_t* counter) {
  std::uint32_t turn = 0;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(turn) : "l"(counter) : "memory");
  return turn;
}

__device__ inline void store_turn(std::uint32_t* counter, std::uint32_t turn) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(turn) : "memory");
}

/// Returns when it is `turn`'s, for additions by the copy engine too.
__device__ inline void await_turn_at(const std::uint32_t* counter, std::uint32_t turn) {
  while (current_turn(counter) != turn) continue;
  fence_async_global();
}

}  // namespace annulus::kernels::sm90
