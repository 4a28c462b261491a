#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/cuda_support.hpp"
#include "runtime/context.hpp"
#include "runtime/nccl_communicator.hpp"
#include "runtime/peer_communicator.hpp"
#include "tests/sharding/communicator_checks.hpp"

// Bytes between the devices of ranks; several ranks may share one. Needs a GPU:
//   mpirun -n 4 build/test_mpi --gtest_filter='*DeviceCommunicator*'
namespace annulus::testing {
namespace {

enum class Transport { nccl, peer };

class DeviceCommunicator : public ::testing::TestWithParam<Transport> {
 protected:
  void SetUp() override {
    context_ = std::make_unique<Context>();
    if (context_->device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
    ranks_ = GetParam() == Transport::nccl ? make_nccl_communicator(context_->world())
                                           : make_peer_communicator(context_->world());
  }
  Communicator& ranks() { return *ranks_; }

 private:
  std::unique_ptr<Context> context_;
  std::unique_ptr<Communicator> ranks_;
};

// A device copy of integers; received ones start poisoned.
struct DeviceMessage {
  std::vector<int> values;
  Buffer memory;

  explicit DeviceMessage(std::vector<int> values_)
      : values(std::move(values_)), memory(Device::cuda, bytes()) {
    copy(host(), device());
  }
  std::int64_t bytes() const { return static_cast<std::int64_t>(values.size() * sizeof(int)); }
  std::vector<int> fetched() const {
    std::vector<int> result(values.size(), -2);
    copy(device(), {result.data(), DType::i32, shape()});
    return result;
  }

 private:
  Shape shape() const { return Shape{static_cast<std::int64_t>(values.size())}; }
  TensorView host() { return {values.data(), DType::i32, shape()}; }
  TensorView device() const { return {memory.data(), DType::i32, shape(), Device::cuda}; }
};

/// Long enough that a copy is still under way when the next exchange starts.
int device_length(int from, int to, int round) { return length_of(from, to, round) * 512; }

void check_device_exchanges(Communicator& c, int rounds) {
  std::vector<std::unique_ptr<DeviceMessage>> outgoing, incoming;
  std::vector<std::unique_ptr<Exchange>> exchanges;
  for (int round = 0; round < rounds; ++round) {
    std::vector<Send> sends;
    std::vector<Receive> receives;
    for (int peer = 0; peer < c.size(); ++peer) {
      outgoing.push_back(std::make_unique<DeviceMessage>(
          message(c.rank(), peer, round, device_length(c.rank(), peer, round))));
      incoming.push_back(std::make_unique<DeviceMessage>(
          std::vector<int>(static_cast<std::size_t>(device_length(peer, c.rank(), round)), -1)));
      sends.push_back({peer, outgoing.back()->memory.data(), outgoing.back()->bytes()});
      receives.push_back({peer, incoming.back()->memory.data(), incoming.back()->bytes()});
    }
    exchanges.push_back(c.exchange(sends, receives));
    // What was sent may be overwritten in stream order once the exchange is waited for.
    if (round % 3 != 2) continue;
    exchanges.back()->wait();
    for (int peer = 0; peer < c.size(); ++peer) {
      DeviceMessage& sent = *outgoing[outgoing.size() - static_cast<std::size_t>(peer) - 1];
      fill_bytes(sent.memory.data(), Device::cuda, 0xee, sent.bytes());
    }
  }
  std::mt19937 random(static_cast<unsigned>(c.rank() + 17));
  std::shuffle(exchanges.begin(), exchanges.end(), random);
  for (std::size_t i = 0; i < exchanges.size(); ++i) {
    while (i % 2 == 0 && !exchanges[i]->test()) {
    }
    exchanges[i]->wait();
  }
  for (int round = 0; round < rounds; ++round) {
    for (int peer = 0; peer < c.size(); ++peer) {
      const auto at = static_cast<std::size_t>(round * c.size() + peer);
      EXPECT_EQ(incoming[at]->fetched(),
                message(peer, c.rank(), round, device_length(peer, c.rank(), round)))
          << "rank " << c.rank() << " of " << c.size() << ", from " << peer << ", round " << round;
    }
  }
}

TEST_P(DeviceCommunicator, ExchangesAnyNumberInFlight) { check_device_exchanges(ranks(), 24); }

TEST_P(DeviceCommunicator, SplitsIntoGroups) {
  const std::unique_ptr<Communicator> part = ranks().split(ranks().rank() % 2, -ranks().rank());
  check_device_exchanges(*part, 3);
  check_all_reduce_sum(*part, 5);
  check_device_exchanges(ranks(), 2);
}

// Pieces that lie behind each other move at once where their lengths allow, on either side by
// itself: the receiver has gaps where the sender has none.
TEST_P(DeviceCommunicator, MovesPiecesOfOneAllocation) {
  constexpr std::int64_t kLengths[] = {64, 640, 3, 128, 64};  // of 4 bytes; 3 ends a piece
  constexpr std::int64_t kGap = 64;
  std::vector<int> values(899);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<int>(i) + 1000 * ranks().rank();
  }
  const int next = (ranks().rank() + 1) % ranks().size();
  const int previous = (ranks().rank() + ranks().size() - 1) % ranks().size();
  DeviceMessage out(values), in(std::vector<int>(899 + 4 * kGap, -1));
  std::vector<Send> sends;
  std::vector<Receive> receives;
  std::int64_t sent = 0;
  std::int64_t received = 0;
  std::vector<int> expected;
  for (const std::int64_t length : kLengths) {
    const bool first = sends.empty();
    if (sends.size() % 2 == 1) {  // before the second and the fourth
      received += kGap;
      expected.insert(expected.end(), kGap, -1);
    }
    sends.push_back({next, static_cast<int*>(out.memory.data()) + sent, 4 * length, !first});
    receives.push_back(
        {previous, static_cast<int*>(in.memory.data()) + received, 4 * length, !first});
    for (std::int64_t i = 0; i < length; ++i) {
      expected.push_back(static_cast<int>(sent + i) + 1000 * previous);
    }
    sent += length;
    received += length;
  }
  expected.resize(in.values.size(), -1);
  ranks().exchange(sends, receives)->wait();
  EXPECT_EQ(in.fetched(), expected);
}

TEST_P(DeviceCommunicator, CountsBytesToOthersOnly) {
  const std::int64_t before = ranks().bytes_sent();
  DeviceMessage out(std::vector<int>(1000, 3)), in(std::vector<int>(1000, -1));
  const int next = (ranks().rank() + 1) % ranks().size();
  const int previous = (ranks().rank() + ranks().size() - 1) % ranks().size();
  const Send send{next, out.memory.data(), out.bytes()};
  const Receive receive{previous, in.memory.data(), in.bytes()};
  ranks().exchange({&send, 1}, {&receive, 1})->wait();
  EXPECT_EQ(in.fetched(), out.values);
  EXPECT_EQ(ranks().bytes_sent() - before, ranks().size() == 1 ? 0 : 4000);
}

// The same memory again and again: it is written when peers have read what was there before. Half
// of the ranks are late, now to write and now to read; no host waits for them.
TEST_P(DeviceCommunicator, ReadsMemoryOfItsOwnDeviceInPlace) {
  constexpr int kLength = 1 << 20;
  constexpr int kRounds = 6;
  const bool everybody = ranks().reach() == Communicator::Reach::everybody;
  std::vector<std::unique_ptr<DeviceMessage>> written, read;
  for (int round = 0; round < kRounds; ++round) {
    written.push_back(std::make_unique<DeviceMessage>(message(ranks().rank(), 0, round, kLength)));
    for (int peer = 0; peer < ranks().size(); ++peer) {
      if (!everybody && peer != ranks().rank()) continue;
      read.push_back(std::make_unique<DeviceMessage>(message(peer, 0, round, kLength)));
      fill_bytes(read.back()->memory.data(), Device::cuda, 0xee, read.back()->bytes());
    }
  }
  const Buffer ballast(Device::cuda, std::int64_t{512} << 20);
  const auto delay = [&ballast] {
    for (int i = 0; i < 4; ++i) fill_bytes(ballast.data(), Device::cuda, i, ballast.bytes());
  };
  auto next = read.begin();
  for (int round = 0; round < kRounds; ++round) {
    const bool late = ranks().rank() % 2 == 0;
    const DeviceMessage& mine = *written[static_cast<std::size_t>(round)];
    const std::unique_ptr<Window> window = ranks().expose(mine.bytes());
    const Shape shape{mine.bytes()};
    const auto bytes_at = [&](const void* data) {
      return ConstTensorView(data, DType::u8, shape, Device::cuda);
    };
    window->begin_writes();
    if (late && round % 2 == 0) delay();
    copy(bytes_at(mine.memory.data()), {window->local(), DType::u8, shape, Device::cuda});
    window->fence();
    if (late && round % 2 == 1) delay();
    for (int peer = 0; peer < ranks().size(); ++peer) {
      ASSERT_EQ(window->peer(peer) != nullptr, everybody || peer == ranks().rank());
      if (window->peer(peer) == nullptr) continue;
      copy(bytes_at(window->peer(peer)),
           {(*next++)->memory.data(), DType::u8, shape, Device::cuda});
    }
    window->end_reads();
  }
  for (const auto& copied : read) EXPECT_EQ(copied->fetched(), copied->values);
}

INSTANTIATE_TEST_SUITE_P(Transports, DeviceCommunicator,
                         ::testing::Values(Transport::nccl, Transport::peer), [](const auto& info) {
                           return info.param == Transport::nccl ? "nccl" : "peer";
                         });

}  // namespace
}  // namespace annulus::testing
