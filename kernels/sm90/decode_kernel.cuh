#pragma once

#include "kernels/cuda/check.hpp"
#include "kernels/sm90/decode_consumer.cuh"
#include "kernels/sm90/decode_launch.hpp"
#include "kernels/sm90/decode_producer.cuh"
#include "kernels/sm90/launch_early.cuh"

/// Decode attention for Hopper: one block a multiprocessor, a producing and a consuming warpgroup.
namespace annulus::kernels::sm90 {

/// Fetches what a launch first reads into L2, and translations of its addresses, while the launch
/// before may still be at work: a hint, which sees no values.
__device__ inline void prefetch_sequences(const DecodeParams& params) {
  const auto fetch = [](const std::int32_t* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
  };
  const int s = static_cast<int>(threadIdx.x);
  if (s >= params.sequences) return;
  if (s % 32 == 0) {
    fetch(params.query_begin + s);
    fetch(params.lengths + s);
  }
  fetch(params.page_table + std::int64_t{s} * params.max_pages);
}

/// What every thread block begins with; every thread takes part. Returns the walk of its run.
template <typename Tile, typename Shared>
__device__ WorkWalker start_block(const DecodeParams& params, Shared& shared, int lane) {
  if (threadIdx.x == 0) {
    const bool gathers = params.box_tokens == 0;
    if (!gathers) {
      tma_prefetch_map(&params.k);
      tma_prefetch_map(&params.v);
    }
    shared.init_barriers(gathers ? Shared::kGatherers : 1);
    fence_barrier_init();
  }
  prefetch_sequences(params);
  admit_next_launch();
  await_earlier_launch();
  deal_work<Tile::kThreads>(params, Tile::kBlock, shared.warp_sums, shared.run);
  return WorkWalker(params, shared.run, lane, Tile::kBlock);
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<DecodeShared<Tile>*>(memory);
  const int lane = lane_of_block(params);
  const WorkWalker walker = start_block<Tile>(params, shared, lane);
  const int warp = warp_of_block();
  if (warp >= 4) {
    DecodeConsumer<Tile>(params, shared, lane).run(walker);
  } else if (params.box_tokens == 0) {
    TokenProducer<Tile>(params, shared).run(walker);
  } else if (warp < 2) {
    const bool keys = warp == 0;  // and the same code for values, which is fetched once
    BoxProducer<Tile>(params, keys ? params.k : params.v, keys ? shared.k : shared.v,
                      keys ? shared.k_full : shared.v_full, keys ? shared.k_empty : shared.v_empty)
        .run(walker);
  }
}

template <typename Tile>
void launch_decode_kernel(const DecodeParams& params, int blocks, cudaStream_t stream) {
  launch_early<Tile, DecodeShared<Tile>>(decode_kernel<Tile>, params, blocks, stream);
}

template <template <typename> typename Tile>
DecodeVariant decode_variant(DType dtype) {
  using Half = Tile<__half>;
  return {Half::kBlock,
          Half::kStages,
          Half::kFewStages,
          Half::Layout::kColumns,
          Half::Layout::kColumns,
          Half::kValueDim,
          dtype == DType::bf16 ? launch_decode_kernel<Tile<__nv_bfloat16>>
                               : launch_decode_kernel<Half>};
}

}  // namespace annulus::kernels::sm90
