#pragma once

#include "kernels/sm90/mbarrier.cuh"

/// Thread block clusters: barriers and shared memory of a neighbour.
namespace annulus::kernels::sm90 {

/// Every thread of every block of the cluster comes here before any goes on.
__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

/// What lies at the same place in block `rank` of the cluster.
__device__ inline std::uint32_t cluster_address(const void* pointer, int rank) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(shared_address(pointer)), "r"(rank));
  return there;
}

/// Says that shared memory was read. A release for the cluster would wait for all of the thread's
/// accesses to global memory too.
__device__ inline void mbarrier_arrive_cluster(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Stores 16 bytes in another block's shared memory, and counts them off its barrier.
__device__ inline void store_cluster(std::uint32_t destination, const float4& values,
                                     std::uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(destination),
      "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w), "r"(barrier)
      : "memory");
}

}  // namespace annulus::kernels::sm90
