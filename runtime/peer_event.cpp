#include "runtime/peer_event.hpp"

#include <unistd.h>

namespace annulus {

kernels::cuda::OwnedEvent make_shared_event() {
  return kernels::cuda::make_event(cudaEventDisableTiming | cudaEventInterprocess);
}

EventAddress address_of(cudaEvent_t event) {
  EventAddress address{};
  ANNULUS_CHECK_CUDA(cudaIpcGetEventHandle(&address.handle, event));
  address.direct = event;
  address.process = getpid();
  return address;
}

bool is_of_this_process(const EventAddress& address) { return address.process == getpid(); }

RemoteEvent::RemoteEvent(const EventAddress& address) : event_(address.direct) {
  if (is_of_this_process(address)) return;
  ANNULUS_CHECK_CUDA(cudaIpcOpenEventHandle(&event_, address.handle));
  opened_.reset(event_);
}

}  // namespace annulus
