#pragma once

#include "kernels/cuda/check.hpp"
#include "kernels/sm90/decode_consumer.cuh"
#include "kernels/sm90/decode_launch.hpp"
#include "kernels/sm90/decode_producer.cuh"

/// Decode attention for Hopper: one block a multiprocessor, a producing and a consuming warpgroup.
namespace annulus::kernels::sm90 {

template <typename Tile>
__device__ void init_barriers(DecodeShared<Tile>& shared, int producers) {
  for (int i = 0; i < Tile::kStages; ++i) {
    mbarrier_init(&shared.k_full[i], producers);
    mbarrier_init(&shared.k_empty[i], 4);
    mbarrier_init(&shared.v_full[i], producers);
    mbarrier_init(&shared.v_empty[i], 4);
  }
  fence_barrier_init();
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<DecodeShared<Tile>*>(memory);
  const bool gathers = params.box_tokens == 0;
  if (threadIdx.x == 0) {
    if (!gathers) {
      tma_prefetch_map(&params.k);
      tma_prefetch_map(&params.v);
    }
    init_barriers(shared, gathers ? 128 : 1);
  }
  deal_work<Tile::kThreads>(params, Tile::kBlock, shared.warp_sums, shared.run);
  const int lane = static_cast<int>(blockIdx.x) % params.lanes;
  const WorkWalker walker(params, shared.run, lane, Tile::kBlock);
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= 4) {
    DecodeConsumer<Tile>(params, shared, lane).run(walker);
  } else if (gathers) {
    TokenProducer<Tile>(params, shared).run(walker);
  } else if (warp == 0) {
    BoxProducer<Tile>(params, shared).run(walker);
  }
}

template <typename Tile>
void launch_decode_kernel(const DecodeParams& params, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(DecodeShared<Tile>);
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = decode_kernel<Tile>;
  ANNULUS_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, kBytes, stream>>>(params);
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

template <template <typename> typename Tile>
DecodeVariant decode_variant(DType dtype) {
  using Half = Tile<__half>;
  return {Half::kBlock,
          Half::Layout::kColumns,
          Half::Layout::kColumns,
          kWarpgroupRows,
          1,
          Half::kValueDim,
          dtype == DType::bf16 ? launch_decode_kernel<Tile<__nv_bfloat16>>
                               : launch_decode_kernel<Half>};
}

}  // namespace annulus::kernels::sm90
