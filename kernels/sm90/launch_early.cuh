#pragma once

#include "kernels/sm90/launch.cuh"

/// Launches that overlap with the one before them on the stream (CUDA programming guide,
/// "programmatic dependent launch").
namespace annulus::kernels::sm90 {

/// Lets the next launch's blocks come as this one's leave.
__device__ inline void admit_next_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/// Waits until all that was launched before is done and its memory visible.
__device__ inline void await_earlier_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/// Starts a launch's blocks as those of the launch before it leave, which hides what a launch
/// costs; they wait in await_earlier_launch().
template <typename Tile, typename Shared, typename Params>
void launch_early(void (*kernel)(Params), const Params& params, int blocks, cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = Tile::kThreads;
  config.dynamicSmemBytes = allow_shared<Shared>(kernel);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  ANNULUS_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace annulus::kernels::sm90
