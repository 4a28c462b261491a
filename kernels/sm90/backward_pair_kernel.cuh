#pragma once

#include "kernels/sm90/backward_launch.hpp"
#include "kernels/sm90/backward_pair_producer.cuh"
#include "kernels/sm90/backward_pair_queries.cuh"
#include "kernels/sm90/backward_pair_roles.cuh"
#include "kernels/sm90/launch.cuh"

/// Backward attention for Hopper by clusters of two thread blocks, for head dimensions at which the
/// additions to dQ are the limit. The pair takes 128 keys, 64 each, over the same queries. The
/// blocks exchange dS, and each computes half of dQ's columns for all keys: of the bytes added to
/// global memory half remain.
namespace annulus::kernels::sm90 {

template <typename Tile>
__device__ void init_barriers(SharedPair<Tile>& shared) {
  constexpr int kReaders = 2 * 2 * 4;  // warps of both blocks that read Q and dO
  mbarrier_init(&shared.work_full, 1);
  mbarrier_init(&shared.work_empty, 2);
  mbarrier_init(&shared.k_full, 1);
  mbarrier_init(&shared.v_full, 1);
  mbarrier_init(&shared.kv_empty, 4 * 3);
  for (int i = 0; i < Tile::kQueryHalves; ++i) {
    mbarrier_init(&shared.q_full[i], 1);
    mbarrier_init(&shared.q_empty[i], kReaders);
  }
  for (int i = 0; i < Tile::kGradHalves; ++i) {
    mbarrier_init(&shared.grad_o_full[i], 1);
    mbarrier_init(&shared.grad_o_empty[i], kReaders);
  }
  for (int i = 0; i < 2; ++i) mbarrier_init(&shared.rows_full[i], 1);
  for (int i = 0; i < Tile::kSlots; ++i) {
    mbarrier_init(&shared.p_full[i], 4);
    mbarrier_init(&shared.grad_s_full[i], 4);
    mbarrier_init(&shared.grad_s_empty[i], 4 * 2);
  }
  fence_barrier_init();
}

template <typename Tile, bool kSoftCap>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(Tile::kThreads, 1)
    pair_backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedPair<Tile>*>(memory);
  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / 128);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&params.q);
    tma_prefetch_map(&params.grad_o);
    tma_prefetch_map(&params.k);
    tma_prefetch_map(&params.v);
    init_barriers(shared);
  }
  cluster_sync();
  if (warpgroup == 0) {
    shrink_registers<Tile::kProducerRegisters>();
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp == 0) PairProducer<Tile>(params, shared).run();
    if (warp == 1 && cluster_rank() == 0) PairScheduler<Tile>(params, shared).run();
  } else if (warpgroup == 1) {
    grow_registers<Tile::kKeyRegisters>();
    PairValueRole<Tile, kSoftCap>(params, shared).run();
  } else if (warpgroup == 2) {
    grow_registers<Tile::kKeyRegisters>();
    PairKeyRole<Tile>(params, shared).run();
  } else {
    shrink_registers<Tile::kQueryRegisters>();
    PairQueries<Tile>(params, shared).run();
  }
  __syncwarp();
  cluster_sync();  // the partner may still store here, or arrive at a barrier
}

template <typename Tile, bool kSoftCap>
void launch_pairs(const BackwardParams& params, int clusters, cudaStream_t stream) {
  launch_blocks<Tile, SharedPair<Tile>>(pair_backward_kernel<Tile, kSoftCap>, params, 2 * clusters,
                                        stream);
}

template <typename Tile, bool kSoftCap>
BackwardVariant pair_variant() {
  BackwardVariant variant{};
  variant.queries = Tile::kQueries;
  variant.keys = Tile::kPairKeys;
  variant.qk_columns = Tile::QkTile::kColumns;
  variant.v_columns = Tile::VTile::kColumns;
  variant.grad_q_rows = 16;
  variant.key_box = 1;
  variant.cluster = 2;
  variant.query_boxes = Tile::kQueries / Tile::kQueryRows;
  variant.launch = [](const BackwardParams& params, int clusters, cudaStream_t stream) {
    params.turns == nullptr ? launch_pairs<Tile, kSoftCap>(params, clusters, stream)
                            : launch_pairs<OrderedTile<Tile>, kSoftCap>(params, clusters, stream);
  };
  return variant;
}

/// The variant of an element type and of scores with or without a soft cap.
template <template <typename> typename Tile>
BackwardVariant pair_variant_of(DType dtype, bool soft_cap) {
  if (dtype == DType::bf16) {
    return soft_cap ? pair_variant<Tile<__nv_bfloat16>, true>()
                    : pair_variant<Tile<__nv_bfloat16>, false>();
  }
  return soft_cap ? pair_variant<Tile<__half>, true>() : pair_variant<Tile<__half>, false>();
}

}  // namespace annulus::kernels::sm90
