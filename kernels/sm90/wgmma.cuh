#pragma once

#include "kernels/sm90/mbarrier.cuh"
#include "kernels/sm90/wgmma_shapes.cuh"

/// Warpgroup matrix multiplication (PTX ISA, "wgmma"): operands, ordering, waiting.
namespace annulus::kernels::sm90 {

/// A tile in shared memory as the copy engine leaves it: boxes of kSwizzle bytes of columns, each
/// box [rows][kSwizzle bytes] with 16-byte chunks permuted within groups of eight rows.
template <int kSwizzle>
struct SwizzledTile {
  static_assert(kSwizzle == 128 || kSwizzle == 64);
  static constexpr int kColumns = kSwizzle / 2;
  static constexpr std::uint64_t kMode = kSwizzle == 128 ? 1 : 2;

  __device__ static std::uint64_t descriptor(std::uint32_t tile, int leading_bytes) {
    // In a cluster the address names the block too, above what a descriptor holds.
    const std::uint64_t address = tile & 0x3FFFFU;
    return (address >> 4) | (static_cast<std::uint64_t>(leading_bytes >> 4) << 16) |
           (static_cast<std::uint64_t>(8 * kSwizzle >> 4) << 32) | (kMode << 62);
  }

  /// Contraction over columns (Q, K): the leading offset is not used.
  __device__ static std::uint64_t k_major(std::uint32_t tile) { return descriptor(tile, 16); }
  __device__ static std::uint64_t k_major(const void* tile) {
    return k_major(shared_address(tile));
  }
  /// Contraction over rows (V): the leading offset leads from one box to the next.
  __device__ static std::uint64_t n_major(std::uint32_t tile, int rows) {
    return descriptor(tile, rows * kSwizzle);
  }
  __device__ static std::uint64_t n_major(const void* tile, int rows) {
    return n_major(shared_address(tile), rows);
  }
  /// Descriptor steps for 16 columns (k-major) and for 16 rows (n-major), in units of 16 bytes.
  __host__ __device__ static constexpr int k_major_step(int step, int rows) {
    constexpr int kStepsPerBox = kColumns / 16;
    return ((step / kStepsPerBox) * rows * kSwizzle + (step % kStepsPerBox) * 32) >> 4;
  }
  __host__ __device__ static constexpr int n_major_step(int step) {
    return (step * 16 * kSwizzle) >> 4;
  }
};

/// A descriptor that many units of 16 bytes further on. Addresses of shared memory never carry into
/// the upper word, which so stays a constant.
__device__ inline std::uint64_t advance(std::uint64_t descriptor, int units) {
  const auto low = static_cast<std::uint32_t>(descriptor) + static_cast<std::uint32_t>(units);
  return (descriptor & 0xFFFFFFFF00000000U) | low;
}

/// The value that all lanes of a warp hold, in a register of the warp: what depends on it, control
/// flow too, then stays there, as the descriptors of wgmma want it.
__device__ inline int uniform(int value) {
  return static_cast<int>(__reduce_or_sync(0xffffffffU, static_cast<unsigned>(value)));
}

/// Before the first wgmma that uses registers which ordinary instructions wrote.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving uses of an accumulator over a wait.
template <int kCount>
__device__ inline void pin_registers(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

template <int kCount>
__device__ inline void pin_registers(std::uint32_t (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

}  // namespace annulus::kernels::sm90
