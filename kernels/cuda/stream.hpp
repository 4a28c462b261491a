#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <map>
#include <memory>

#include "kernels/cuda/check.hpp"

namespace annulus::kernels::cuda {

struct StreamDeleter {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
using OwnedStream = std::unique_ptr<CUstream_st, StreamDeleter>;

/// A stream that does not wait for the default one. Transfers get the highest priority: they are
/// short, and what waits for them is not.
inline OwnedStream make_transfer_stream() {
  int least = 0;
  int greatest = 0;
  ANNULUS_CHECK_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t stream = nullptr;
  ANNULUS_CHECK_CUDA(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
  return OwnedStream(stream);
}

struct EventDeleter {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using OwnedEvent = std::unique_ptr<CUevent_st, EventDeleter>;

inline OwnedEvent make_event(unsigned flags = cudaEventDisableTiming) {
  cudaEvent_t event = nullptr;
  ANNULUS_CHECK_CUDA(cudaEventCreateWithFlags(&event, flags));
  return OwnedEvent(event);
}

/// All of `later` go on when all that `earlier` holds now is done. A wait is for what the event
/// stood for then, so that one serves all calls of a thread: to make it takes as long as to use it.
inline void order(cudaStream_t earlier, std::initializer_list<cudaStream_t> later) {
  thread_local std::map<int, OwnedEvent> events;
  int device = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  OwnedEvent& event = events[device];
  if (event == nullptr) event = make_event();
  ANNULUS_CHECK_CUDA(cudaEventRecord(event.get(), earlier));
  for (cudaStream_t stream : later) ANNULUS_CHECK_CUDA(cudaStreamWaitEvent(stream, event.get()));
}

/// A copy between allocations of devices, by the copy engine also within one device: a plain copy
/// there takes multiprocessors, which a kernel that waits for the bytes may hold. `stream` is not
/// the default one.
inline void copy_by_engine(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  std::size_t first = 0;
  ANNULUS_CHECK_CUDA(cudaMemcpyBatchAsync(&to, &from, &bytes, 1, &attributes, &first, 1, stream));
}

/// Whether the work before `event` is done.
inline bool is_done(cudaEvent_t event) {
  const cudaError_t state = cudaEventQuery(event);
  if (state == cudaErrorNotReady) return false;
  ANNULUS_CHECK_CUDA(state);
  return true;
}

}  // namespace annulus::kernels::cuda
