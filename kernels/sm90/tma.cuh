#pragma once

#include <cuda.h>

#include "kernels/sm90/mbarrier.cuh"

/// Bulk tensor copies from global to shared memory (PTX ISA, "cp.async.bulk.tensor").
namespace annulus::kernels::sm90 {

/// L2 eviction policies, in the encoding of createpolicy.fractional at fraction 1.
enum class CachePolicy : std::uint64_t {
  evict_first = 0x12F0000000000000,
  evict_last = 0x14F0000000000000,
};

__device__ inline void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Box at (column, row, head, batch); elements outside the tensor arrive as zeros.
__device__ inline void tma_load(void* destination, const CUtensorMap* map, std::uint64_t* barrier,
                                CachePolicy policy, int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch),
      "l"(static_cast<std::uint64_t>(policy))
      : "memory");
}

/// The same with a rank of five: (column, head in pack, row, pack, batch).
__device__ inline void tma_load(void* destination, const CUtensorMap* map, std::uint64_t* barrier,
                                CachePolicy policy, int column, int head, int row, int pack,
                                int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(
          shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(row), "r"(pack),
      "r"(batch), "l"(static_cast<std::uint64_t>(policy))
      : "memory");
}

/// Has L2 fetch what the same copy will read.
__device__ inline void tma_prefetch(const CUtensorMap* map, int column, int head, int row, int pack,
                                    int batch) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map),
      "r"(column), "r"(head), "r"(row), "r"(pack), "r"(batch)
      : "memory");
}

/// Adds a box of fp32 in shared memory to global memory; elements outside the tensor are left out.
__device__ inline void tma_reduce_add(const CUtensorMap* map, const void* source, int column,
                                      int row, int head, int batch) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group"
      " [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

/// Writes a box in shared memory to global memory; elements outside the tensor are left out.
__device__ inline void tma_store(const CUtensorMap* map, const void* source, int column, int row,
                                 int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(map),
      "r"(shared_address(source)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Waits until at most kPending of this thread's groups still have to read shared memory.
template <int kPending>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

/// Waits until at most kPending of this thread's groups are incomplete.
template <int kPending>
__device__ inline void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace annulus::kernels::sm90
