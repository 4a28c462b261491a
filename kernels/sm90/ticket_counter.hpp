#pragma once

#include <cuda_runtime.h>

namespace annulus::kernels::sm90 {

/// A zero in device memory for the kernels of one stream. Kernels of a stream follow each other
/// and each leaves the counter at zero, so the stream keeps two for good: at most two kernels in a
/// row overlap. A capturing stream gets a fresh one a call, because its graph may run on any
/// stream.
unsigned* ticket_counter(cudaStream_t stream);

}  // namespace annulus::kernels::sm90
