#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/context.hpp"
#include "runtime/peer_communicator.hpp"
#include "sharding/execution.hpp"
#include "sharding/memory_model.hpp"
#include "tests/runtime/device_shards.hpp"
#include "tests/sharding/case_table.hpp"

// A ring's forward pass in one launch, which may begin before its peers do; ranks that share a
// device behave as if each had its own. Needs a GPU of the Hopper generation:
//   mpirun -n 4 build/test_mpi --gtest_filter='*DeviceOneLaunch*'
namespace annulus::testing {
namespace {

constexpr std::int64_t kDim = 64;
constexpr std::int64_t kRows = 256;  // of a rank: few thread blocks, which leave the others room

constexpr AttentionSizes kSizes{.head_dim = kDim, .value_dim = kDim};

std::shared_ptr<PlanRequest> request_of(int ranks, const AttentionMask& mask,
                                        Scheme scheme = Scheme::ring) {
  auto request = std::make_shared<PlanRequest>();
  request->scheme = scheme;
  const std::int64_t seq = kRows * ranks;
  request->q_layout = request->kv_layout = SequenceLayout::zigzag(seq, ranks);
  request->mask = make_slices(mask, 1, seq, seq);
  request->batch = 1;
  request->q_heads = scheme == Scheme::ring ? 4 : 8;
  request->kv_heads = 2;
  return request;
}

class DeviceOneLaunch : public ::testing::Test {
 protected:
  void SetUp() override {
    context_ = std::make_unique<Context>();
    if (context_->device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
    if (context_->size() == 1) GTEST_SKIP() << "one rank has no peers";
    ranks_ = make_peer_communicator(context_->world(), nullptr, PeerDevices::apart);
  }
  Context& context() { return *context_; }
  Communicator& ranks() { return *ranks_; }

 private:
  std::unique_ptr<Context> context_;
  std::unique_ptr<Communicator> ranks_;
};

TEST_F(DeviceOneLaunch, ComesToWhatStagesAndPartsComeTo) {
  AttentionMask window = causal_mask();
  window.window_left = 150;
  ExecuteOptions by_stages;
  by_stages.one_launch = false;
  std::mt19937 random(static_cast<unsigned>(ranks().rank()));
  std::uint64_t seed = static_cast<std::uint64_t>(ranks().rank()) * 100000;
  for (const Scheme scheme : {Scheme::ring, Scheme::ulysses}) {
    for (const AttentionMask& mask : {causal_mask(), AttentionMask(), window}) {
      const auto request = request_of(ranks().size(), mask, scheme);
      const AttentionPlan plan(request, ranks().rank());
      DeviceShards rows(*request, ranks().rank(), kDim);
      for (int call = 0; call < 8; ++call) {
        rows.change(++seed);
        std::this_thread::sleep_for(std::chrono::milliseconds(random() % 3 * 5));
        ExecutionReport report;
        ExecuteOptions at_once;
        at_once.report = &report;
        const Tensor found = rows.forward(ranks(), plan, at_once);
        EXPECT_EQ(report.buffer_bytes, forward_buffer_bytes(plan, kSizes, {.one_launch = true}));
        const Tensor found_lse = rows.log_sum_exp();
        const Tensor expected = rows.forward(ranks(), plan, by_stages);
        EXPECT_LE(largest_difference(found, expected), 0x1p-7) << name(scheme) << ", call " << call;
        EXPECT_LE(largest_difference(found_lse, rows.log_sum_exp()), 1e-5)
            << name(scheme) << ", call " << call;
      }
    }
  }
}

TEST_F(DeviceOneLaunch, BeginsBeforeItsPeersDo) {
  constexpr std::chrono::milliseconds kLate(300);
  const auto request = request_of(ranks().size(), AttentionMask());
  const AttentionPlan plan(request, ranks().rank());
  DeviceShards rows(*request, ranks().rank(), kDim);
  rows.change(static_cast<std::uint64_t>(ranks().rank()));
  for (int call = 0; call < 6; ++call) {
    rows.forward(ranks(), plan);
    context().world().barrier();
  }
  if (ranks().rank() != 0) std::this_thread::sleep_for(kLate);
  StageRecorder recorder;
  ExecuteOptions options;
  options.recorder = &recorder;
  rows.forward(ranks(), plan, options);
  if (ranks().rank() != 0) return;
  double seconds = 0.0;  // of the kernel, which waits for the others' keys
  for (const StageRecord& record : recorder.records()) {
    if (record.kind != StageRecord::Kind::compute) continue;
    seconds += static_cast<double>(record.end_ns - record.begin_ns) * 1e-9;
  }
  EXPECT_GT(seconds, 0.5 * std::chrono::duration<double>(kLate).count());
}

// Claims that rows are on their way, which never come.
class FailingRanks final : public Communicator {
 public:
  FailingRanks() : Communicator(Device::cuda, Carrier::copy_engine) {}
  int rank() const override { return 0; }
  int size() const override { return 2; }
  std::unique_ptr<Communicator> split(int, int) override { return nullptr; }
  void all_gather(std::span<const std::byte>, std::span<std::byte>) override {}
  void all_reduce_sum(std::span<float>) override {}
  std::unique_ptr<Window> expose(std::int64_t, std::int64_t) override { return nullptr; }

 protected:
  std::unique_ptr<Exchange> start(std::span<const Send>, std::span<const Receive>,
                                  Stream) override {
    class Failing final : public Exchange {
      bool test() override { return false; }
      void wait(Stream) override { throw Error(ExitCode::peer, "no rows"); }
      bool may_follow_kernel() const override { return true; }
    };
    return std::make_unique<Failing>();
  }
};

TEST_F(DeviceOneLaunch, EndsWhereTheRowsNeverCome) {
  FailingRanks failing;
  const auto request = request_of(2, causal_mask());
  const AttentionPlan plan(request, 0);
  DeviceShards rows(*request, 0, kDim);
  rows.change(1);
  EXPECT_THROW(rows.forward(failing, plan), Error);
  synchronize(Device::cuda, {});  // for ever, if the kernel went on waiting
}

}  // namespace
}  // namespace annulus::testing
