#pragma once

#include <cuda_runtime.h>

#include "kernels/sm90/forward_work.hpp"

namespace annulus::kernels::sm90 {

struct WorkTables {
  const TileSlice* slices = nullptr;
  const TileEntry* entries = nullptr;
};

/// The work's tables in device memory. They are kept and found again by content, because a model
/// repeats one mask layer after layer and an upload costs as much as a short kernel. What a
/// captured graph refers to is kept for good; of the rest the oldest give way.
WorkTables work_tables(const ForwardWork& work, cudaStream_t stream);

}  // namespace annulus::kernels::sm90
