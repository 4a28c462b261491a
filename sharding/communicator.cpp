#include "sharding/communicator.hpp"

#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/error.hpp"

namespace annulus {
namespace {

class FinishedExchange final : public Exchange {
 public:
  bool test() override { return true; }
  void wait(Stream) override {}
  bool may_follow_kernel() const override { return true; }
};

void check_message(std::string_view kind, int peer, const void* data, std::int64_t bytes,
                   int size) {
  require(0 <= peer && peer < size, ExitCode::internal,
          "exchange: {} names rank {} in a group of size {}", kind, peer, size);
  require(bytes >= 0 && (bytes == 0 || data != nullptr), ExitCode::internal,
          "exchange: {} of {} bytes {} rank {} has no memory", kind, bytes,
          kind == "send" ? "to" : "from", peer);
}

/// Messages to oneself meet in order, as they would on the wire.
void copy_own(const std::vector<Send>& sends, const std::vector<Receive>& receives, Device device,
              Stream stream) {
  require(sends.size() == receives.size(), ExitCode::internal,
          "exchange: {} sends but {} receives of a rank with itself", sends.size(),
          receives.size());
  for (std::size_t i = 0; i < sends.size(); ++i) {
    require(sends[i].bytes == receives[i].bytes, ExitCode::internal,
            "exchange: a rank sends itself {} bytes but receives {}", sends[i].bytes,
            receives[i].bytes);
    const Shape bytes{sends[i].bytes};
    copy(ConstTensorView(sends[i].data, DType::u8, bytes, device),
         TensorView(receives[i].data, DType::u8, bytes, device), stream);
  }
}

}  // namespace

std::unique_ptr<Exchange> Communicator::exchange(std::span<const Send> sends,
                                                 std::span<const Receive> receives, Stream stream) {
  std::vector<Send> own_sends;
  std::vector<Send> remote_sends;
  for (const Send& send : sends) {
    check_message("send", send.peer, send.data, send.bytes, size());
    require(send.rows == 1 || carrier_ == Carrier::copy_engine, ExitCode::internal,
            "exchange: {} rows in one message; accepted where the copy engine moves them",
            send.rows);
    if (send.bytes > 0) (send.peer == rank() ? own_sends : remote_sends).push_back(send);
  }
  std::vector<Receive> own_receives;
  std::vector<Receive> remote_receives;
  for (const Receive& receive : receives) {
    check_message("receive", receive.peer, receive.data, receive.bytes, size());
    if (receive.bytes > 0) {
      (receive.peer == rank() ? own_receives : remote_receives).push_back(receive);
    }
  }
  std::unique_ptr<Exchange> under_way;
  if (remote_sends.empty() && remote_receives.empty()) {
    under_way = std::make_unique<FinishedExchange>();
  } else {
    under_way = start(remote_sends, remote_receives, stream);
  }
  for (const Send& send : remote_sends) bytes_sent_ += send.bytes;
  copy_own(own_sends, own_receives, device_, stream);
  return under_way;
}

Communicator& Communicator::part(const std::string& name, int color, int key) {
  std::unique_ptr<Communicator>& kept = parts_[name];
  if (kept == nullptr) kept = split(color, key);
  return *kept;
}

void Communicator::barrier() {
  const std::byte mine{1};
  std::vector<std::byte> all(static_cast<std::size_t>(size()));
  all_gather({&mine, 1}, all);
}

}  // namespace annulus
