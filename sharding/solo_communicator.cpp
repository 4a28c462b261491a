#include "sharding/solo_communicator.hpp"

#include <algorithm>

#include "kernels/buffer.hpp"
#include "kernels/error.hpp"

namespace annulus {
namespace {

class SoloWindow final : public Window {
 public:
  explicit SoloWindow(std::int64_t bytes) : memory_(Device::cpu, bytes) {}
  void* local() override { return memory_.data(); }
  const void* peer(int /*peer*/) const override { return memory_.data(); }
  void fence(Stream /*stream*/) override {}

 private:
  Buffer memory_;
};

}  // namespace

std::unique_ptr<Communicator> SoloCommunicator::split(int /*color*/, int /*key*/) {
  return std::make_unique<SoloCommunicator>(device());
}

void SoloCommunicator::all_gather(std::span<const std::byte> mine, std::span<std::byte> all) {
  std::copy(mine.begin(), mine.end(), all.begin());
}

void SoloCommunicator::all_reduce_sum(std::span<float> /*values*/) {}

std::unique_ptr<Window> SoloCommunicator::expose(std::int64_t bytes, std::int64_t /*granule*/) {
  return std::make_unique<SoloWindow>(bytes);
}

std::unique_ptr<Exchange> SoloCommunicator::start(std::span<const Send> /*sends*/,
                                                  std::span<const Receive> /*receives*/,
                                                  Stream /*stream*/) {
  throw Error(ExitCode::internal, "exchange: a group of one rank has no other rank to talk to");
}

}  // namespace annulus
