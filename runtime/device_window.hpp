#pragma once

#include "kernels/buffer.hpp"
#include "sharding/communicator.hpp"

namespace annulus {

/// Device memory that no peer reads in place: a kernel reads its keys once a query tile, so they
/// are copied over once instead.
class DeviceWindow final : public Window {
 public:
  DeviceWindow(Communicator& host, std::int64_t bytes)
      : host_(host), memory_(Device::cuda, bytes) {}

  void* local() override { return memory_.data(); }
  const void* peer(int peer) const override {
    return peer == host_.rank() ? memory_.data() : nullptr;
  }
  void fence(Stream /*stream*/) override { host_.barrier(); }

 private:
  Communicator& host_;
  Buffer memory_;
};

}  // namespace annulus
