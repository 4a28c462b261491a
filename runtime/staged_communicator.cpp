#include "runtime/staged_communicator.hpp"

#include <utility>
#include <vector>

#include "kernels/buffer.hpp"
#include "runtime/device_window.hpp"

namespace annulus {
namespace {

void copy_bytes(const void* from, Device from_device, void* to, Device to_device,
                std::int64_t bytes, Stream stream) {
  copy(ConstTensorView(from, DType::u8, Shape{bytes}, from_device),
       TensorView(to, DType::u8, Shape{bytes}, to_device), stream);
}

/// Host copies of what is sent and of what arrives; a received message goes to the device when the
/// caller waits for it.
class StagedExchange final : public Exchange {
 public:
  StagedExchange(Communicator& host, std::span<const Send> sends, std::span<const Receive> receives,
                 Stream stream)
      : receives_(receives.begin(), receives.end()) {
    std::vector<Send> host_sends;
    for (const Send& send : sends) {
      outgoing_.emplace_back(Device::cpu, send.bytes);
      copy_bytes(send.data, Device::cuda, outgoing_.back().data(), Device::cpu, send.bytes, stream);
      host_sends.push_back({send.peer, outgoing_.back().data(), send.bytes});
    }
    std::vector<Receive> host_receives;
    for (const Receive& receive : receives_) {
      incoming_.emplace_back(Device::cpu, receive.bytes);
      host_receives.push_back({receive.peer, incoming_.back().data(), receive.bytes});
    }
    under_way_ = host.exchange(host_sends, host_receives);
  }

  bool test() override { return under_way_->test(); }

  void wait(Stream stream) override {
    under_way_->wait();
    for (std::size_t i = 0; i < incoming_.size(); ++i) {
      copy_bytes(incoming_[i].data(), Device::cpu, receives_[i].data, Device::cuda,
                 receives_[i].bytes, stream);
    }
    if (!incoming_.empty()) synchronize(Device::cuda, stream);  // the host copies end here
    incoming_.clear();
  }

 private:
  std::vector<Receive> receives_;
  std::vector<Buffer> outgoing_;
  std::vector<Buffer> incoming_;
  std::unique_ptr<Exchange> under_way_;
};

class StagedCommunicator final : public Communicator {
 public:
  explicit StagedCommunicator(std::unique_ptr<Communicator> host)
      : Communicator(Device::cuda), host_(std::move(host)) {}

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  std::unique_ptr<Communicator> split(int color, int key) override {
    return std::make_unique<StagedCommunicator>(host_->split(color, key));
  }
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    host_->all_gather(mine, all);
  }
  void all_reduce_sum(std::span<float> values) override { host_->all_reduce_sum(values); }
  std::unique_ptr<Window> expose(std::int64_t bytes, std::int64_t /*granule*/) override {
    return std::make_unique<DeviceWindow>(*host_, bytes);
  }

 protected:
  std::unique_ptr<Exchange> start(std::span<const Send> sends, std::span<const Receive> receives,
                                  Stream stream) override {
    return std::make_unique<StagedExchange>(*host_, sends, receives, stream);
  }

 private:
  std::unique_ptr<Communicator> host_;
};

}  // namespace

std::unique_ptr<Communicator> make_staged_communicator(Communicator& host) {
  return std::make_unique<StagedCommunicator>(host.split(0, host.rank()));
}

}  // namespace annulus
