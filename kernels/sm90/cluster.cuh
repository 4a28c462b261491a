#pragma once

#include "kernels/sm90/tma.cuh"

/// Clusters of two thread blocks: barriers and shared memory of the partner. A place is named by
/// the address that the same place has in the own block, mapped once.
namespace annulus::kernels::sm90 {

__device__ inline int cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

/// Every thread of every block of the cluster comes here before any goes on.
__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

/// What lies at the same place in block `rank` of the cluster.
__device__ inline std::uint32_t cluster_address(std::uint32_t address, int rank) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

/// Says that shared memory was read. A release for the cluster would wait for all of the thread's
/// accesses to global memory too.
__device__ inline void mbarrier_arrive_cluster(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Stores 16 bytes in the partner's shared memory, and counts them off its barrier.
__device__ inline void store_cluster(std::uint32_t to, const int4& words, std::uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(barrier)
      : "memory");
}

/// Has the copy engine carry bytes from this block's shared memory to the partner's, and count
/// them off its barrier.
__device__ inline void bulk_copy_cluster(std::uint32_t to, std::uint32_t from, std::uint32_t bytes,
                                         std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

/// Box at (column, row, head, batch) to the same place in both blocks, counted off each one's
/// barrier.
__device__ inline void tma_load_both(void* destination, const CUtensorMap* map,
                                     std::uint64_t* barrier, CachePolicy policy, int column,
                                     int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(
          shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch),
      "h"(static_cast<std::uint16_t>(3)), "l"(static_cast<std::uint64_t>(policy))
      : "memory");
}

}  // namespace annulus::kernels::sm90
