#pragma once

#include "kernels/sm90/forward_consumer.cuh"
#include "kernels/sm90/forward_producer.cuh"

/// Forward attention for Hopper: one persistent block a multiprocessor, a producing warp and two
/// or three consuming warpgroups.
namespace annulus::kernels::sm90 {

template <typename Tile>
__device__ void init_barriers(SharedTile<Tile>& shared) {
  constexpr int kConsumerWarps = Tile::kWarpgroups * 4;
  mbarrier_init(&shared.work_full, 1);
  mbarrier_init(&shared.work_empty, 1);
  for (int i = 0; i < Tile::kQueryBuffers; ++i) {
    mbarrier_init(&shared.q_full[i], 1);
    mbarrier_init(&shared.q_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < Tile::kStages; ++i) {
    mbarrier_init(&shared.k_full[i], 1);
    mbarrier_init(&shared.k_empty[i], kConsumerWarps);
    mbarrier_init(&shared.v_full[i], 1);
    mbarrier_init(&shared.v_empty[i], kConsumerWarps);
  }
  fence_barrier_init();
}

/// Rows that no query fills, where a pack of heads does not divide a warpgroup's 64: what lay there
/// before would look like scores out of range.
template <typename Tile>
__device__ void clear_unused_rows(const ForwardParams& params, SharedTile<Tile>& shared) {
  constexpr int kChunks = Tile::QkTile::kColumns * 2 / 16;
  const int used = params.pack * params.warpgroup_queries;
  if (used == 64) return;
  auto* q = reinterpret_cast<uint4*>(&shared.q);
  constexpr int kBoxes = Tile::kQueryBuffers * Tile::kWarpgroups * Tile::kQkBoxes;
  for (int i = static_cast<int>(threadIdx.x); i < kBoxes * 64 * kChunks; i += Tile::kThreads) {
    if (i / kChunks % 64 >= used) q[i] = make_uint4(0, 0, 0, 0);
  }
  fence_async_shared();
}

template <typename Tile, bool kSoftCap>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedTile<Tile>*>(memory);
  const int warpgroup = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&params.q);
    tma_prefetch_map(&params.segments[0].k);
    tma_prefetch_map(&params.segments[0].v);
    init_barriers(shared);
  }
  if constexpr (Tile::kTrustsMaxima) clear_unused_rows(params, shared);
  __syncthreads();
  if (warpgroup == 0) {
    shrink_registers<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) ForwardProducer<Tile>(params, shared).run();
    if (threadIdx.x == 32) ForwardScheduler<Tile>(params, shared).run();
  } else {
    grow_registers<Tile::kConsumerRegisters>();
    ForwardConsumer<Tile, kSoftCap>(params, shared, warpgroup - 1).run();
  }
}

}  // namespace annulus::kernels::sm90
