#pragma once

#include "kernels/sm90/backward_drain.cuh"
#include "kernels/sm90/backward_groups.cuh"
#include "kernels/sm90/backward_keys.cuh"
#include "kernels/sm90/backward_ordered_drain.cuh"
#include "kernels/sm90/backward_producer.cuh"
#include "kernels/sm90/backward_queries.cuh"
#include "kernels/sm90/backward_rows.cuh"

/// Backward attention for Hopper: one persistent block a multiprocessor. It keeps dK and dV of a
/// block of keys in registers while the queries that meet it pass by. Two or three warpgroups feed
/// the tensor cores, as Division says, so that the exponentials of one pass under the products of
/// the others.
namespace annulus::kernels::sm90 {

template <typename Tile>
__device__ void init_barriers(SharedBackward<Tile>& shared) {
  mbarrier_init(&shared.work_full, 1);
  mbarrier_init(&shared.work_empty, 1);
  for (int i = 0; i < Tile::kKvBuffers; ++i) {
    mbarrier_init(&shared.k_full[i], 1);
    mbarrier_init(&shared.v_full[i], 1);
    mbarrier_init(&shared.kv_empty[i], 4 * (Tile::kWarpgroups - 1));
  }
  for (int i = 0; i < Tile::kStages; ++i) {
    mbarrier_init(&shared.q_full[i], Tile::kDrained ? 2 : 1);
    mbarrier_init(&shared.q_empty[i], 4 * Tile::kGroups);
    mbarrier_init(&shared.grad_o_full[i], 1);
    mbarrier_init(&shared.grad_o_empty[i], 4 * Tile::kGroups);
    mbarrier_init(&shared.rows_full[i], 1);
  }
  for (int i = 0; i < Tile::kScoreStages; ++i) {
    mbarrier_init(&shared.grad_s_full[i], 4 * Tile::kGroups);
    mbarrier_init(&shared.grad_s_empty[i], Tile::kDivision == Division::halves ? 8 : 4);
  }
  for (int i = 0; i < Tile::kNotes; ++i) mbarrier_init(&shared.note_full[i], 1);
  for (int group = 0; group < Tile::kGroups; ++group) {
    mbarrier_init(&shared.grad_q_full[group], 4);
    mbarrier_init(&shared.grad_q_empty[group], 1);
  }
  fence_barrier_init();
}

template <typename Tile, bool kSoftCap>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedBackward<Tile>*>(memory);
  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&params.q);
    tma_prefetch_map(&params.grad_o);
    tma_prefetch_map(&params.k);
    tma_prefetch_map(&params.v);
    init_barriers(shared);
  }
  __syncthreads();
  if (warpgroup == 0) {
    shrink_registers<Tile::kProducerRegisters>();
    if (threadIdx.x < 32) BackwardProducer<Tile>(params, shared).run();
    if constexpr (!Tile::kOrdered) {
      if (threadIdx.x == 32) BackwardScheduler<Tile>(params, shared).run();
      if constexpr (Tile::kDrained) {
        if (threadIdx.x == 64) BackwardDrain<Tile>(params, shared).run();
      }
    } else if constexpr (Tile::kDrained) {
      if (threadIdx.x == 32) OrderedDrain<Tile>(params, shared, 0).run();
      if (!Tile::kTurns && threadIdx.x == 64) OrderedDrain<Tile>(params, shared, 1).run();
    }
    if constexpr (Tile::kDrained) {
      if (threadIdx.x >= 96) BackwardRows<Tile>(params, shared).run();
    }
  } else if (!Tile::kDrained && warpgroup == 3) {
    if constexpr (!Tile::kDrained) {
      shrink_registers<Tile::kQueryRegisters>();
      BackwardQueries<Tile>(params, shared).run();
    }
  } else {
    grow_registers<Tile::kKeyRegisters>();
    if constexpr (Tile::kDrained) {
      BackwardGroup<Tile, kSoftCap>(params, shared, warpgroup - 1).run();
    } else {
      BackwardKeys<Tile, kSoftCap>(params, shared, warpgroup - 1).run();
    }
  }
}

}  // namespace annulus::kernels::sm90
