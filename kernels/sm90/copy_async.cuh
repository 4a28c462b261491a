#pragma once

#include "kernels/sm90/mbarrier.cuh"

/// Copies of 16 bytes from global to shared memory, which threads wait for (PTX ISA, "cp.async").
namespace annulus::kernels::sm90 {

/// Zeros come where `valid` is false.
__device__ inline void copy_async(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Counts as this thread's arrival once its copies so far have come.
__device__ inline void copy_async_arrive(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

/// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace annulus::kernels::sm90
