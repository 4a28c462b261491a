#include "kernels/sm90/decode_kernel.cuh"
#include "kernels/sm90/decode_latent_consumer.cuh"
#include "kernels/sm90/decode_latent_producer.cuh"

/// Multi-head latent decode for Hopper.
namespace annulus::kernels::sm90 {
namespace {

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    latent_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<LatentShared<Tile>*>(memory);
  const int lane = lane_of_block(params);
  const WorkWalker walker = start_block<Tile>(params, shared, lane);
  const int warp = warp_of_block();
  if (warp >= 4) {
    grow_registers<Tile::kConsumerRegisters>();
    LatentConsumer<Tile>(params, shared, lane).run(walker);
  } else {
    shrink_registers<Tile::kProducerRegisters>();
    if (params.box_tokens == 0) {
      LatentTokenProducer<Tile>(params, shared).run(walker);
    } else if (warp == 0) {
      LatentBoxProducer<Tile, 0>(params, shared).run(walker);
    } else if (warp == 1) {
      LatentBoxProducer<Tile, 1>(params, shared).run(walker);
    }
  }
}

template <typename Element>
void launch(const DecodeParams& params, int blocks, cudaStream_t stream) {
  using Tile = LatentTile<Element>;
  launch_early<Tile, LatentShared<Tile>>(latent_kernel<Tile>, params, blocks, stream);
}

}  // namespace

DecodeVariant decode_latent(DType dtype) {
  using Tile = LatentTile<__half>;
  return {Tile::kBlock,
          1,
          1,
          Tile::Layout::kColumns,
          Tile::Layout::kColumns,
          Tile::kValueDim,
          dtype == DType::bf16 ? launch<__nv_bfloat16> : launch<__half>};
}

}  // namespace annulus::kernels::sm90
