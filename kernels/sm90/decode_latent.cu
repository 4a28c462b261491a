#include "kernels/cuda/check.hpp"
#include "kernels/sm90/decode_latent_consumer.cuh"
#include "kernels/sm90/decode_latent_producer.cuh"
#include "kernels/sm90/decode_launch.hpp"

/// Multi-head latent decode for Hopper: clusters of two thread blocks.
namespace annulus::kernels::sm90 {
namespace {

template <typename Tile>
__device__ void init_barriers(LatentShared<Tile>& shared, int producers) {
  for (int stage = 0; stage < Tile::kStages; ++stage) {
    mbarrier_init(&shared.full[stage], producers);
    mbarrier_init(&shared.empty[stage], Tile::kWarpgroups * 4);
  }
  for (int warpgroup = 0; warpgroup < Tile::kWarpgroups; ++warpgroup) {
    mbarrier_init(&shared.scores_full[warpgroup], 1);
    mbarrier_init(&shared.scores_empty[warpgroup], 4);
  }
  fence_barrier_init();
}

template <typename Tile>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(Tile::kThreads, 1)
    latent_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<LatentShared<Tile>*>(memory);
  const bool gathers = params.box_tokens == 0;
  if (threadIdx.x == 0) {
    if (!gathers) {
      tma_prefetch_map(&params.k);
      tma_prefetch_map(&params.v);
    }
    init_barriers(shared, gathers ? 128 : 1);
  }
  deal_work<Tile::kThreads>(params, Tile::kBlock, shared.warp_sums, shared.run);
  cluster_sync();
  const int lane = static_cast<int>(blockIdx.x) % params.lanes;
  const WorkWalker walker(params, shared.run, lane, Tile::kBlock);
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= 4) {
    grow_registers<Tile::kConsumerRegisters>();
    LatentConsumer<Tile>(params, shared, lane).run(walker);
  } else {
    shrink_registers<Tile::kProducerRegisters>();
    if (gathers) {
      LatentTokenProducer<Tile>(params, shared, lane % 2).run(walker);
    } else if (warp == 0) {
      LatentBoxProducer<Tile>(params, shared, lane % 2).run(walker);
    }
  }
  cluster_sync();  // the neighbour may still store here, or arrive at a barrier
}

template <typename Element>
void launch(const DecodeParams& params, int blocks, cudaStream_t stream) {
  using Tile = LatentTile<Element>;
  constexpr int kBytes = sizeof(LatentShared<Tile>);
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = latent_kernel<Tile>;
  ANNULUS_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, kBytes, stream>>>(params);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

}  // namespace

DecodeVariant decode_latent(DType dtype) {
  using Tile = LatentTile<__half>;
  return {Tile::kBlock,
          Tile::Layout::kColumns,
          Tile::RotaryLayout::kColumns,
          Tile::kWarpgroups * kWarpgroupRows,
          Tile::kAllColumns / Tile::kColumns,
          Tile::kColumns,
          dtype == DType::bf16 ? launch<__nv_bfloat16> : launch<__half>};
}

}  // namespace annulus::kernels::sm90
