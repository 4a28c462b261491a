#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/stream.hpp"

namespace annulus {

/// How another rank reaches an event: by handle, or directly within the same process.
struct EventAddress {
  cudaIpcEventHandle_t handle;
  cudaEvent_t direct;
  std::int64_t process;
};

/// An event that other processes may wait for.
kernels::cuda::OwnedEvent make_shared_event();
EventAddress address_of(cudaEvent_t event);
bool is_of_this_process(const EventAddress& address);

/// An event of another rank, closed with this.
class RemoteEvent {
 public:
  explicit RemoteEvent(const EventAddress& address);
  cudaEvent_t get() const { return event_; }

 private:
  kernels::cuda::OwnedEvent opened_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace annulus
