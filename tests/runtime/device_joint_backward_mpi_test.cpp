#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "runtime/context.hpp"
#include "runtime/transport.hpp"
#include "sharding/execution.hpp"
#include "sharding/memory_model.hpp"
#include "tests/runtime/device_shards.hpp"

// A ring's backward pass where one device has all ranks' memory: each rank adds to everybody's
// gradients at once. Held against partials that are sent back. Needs a GPU of the Hopper
// generation, which ranks share:
//   mpirun -n 4 build/test_mpi --gtest_filter='*DeviceJointBackward*'
namespace annulus::testing {
namespace {

constexpr std::int64_t kDim = 64;

std::shared_ptr<PlanRequest> request_of(int ranks, std::int64_t seq, const AttentionMask& mask) {
  auto request = std::make_shared<PlanRequest>();
  request->q_layout = request->kv_layout = SequenceLayout::zigzag(seq, ranks);
  request->batch = 2;
  request->mask = make_slices(mask, request->batch, seq, seq);
  request->q_heads = 6;
  request->kv_heads = 3;  // rows of no power of two
  return request;
}

TEST(DeviceJointBackward, AddsWhatPartialsAddWhenTheyReturn) {
  Context context;
  if (context.device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  const int ranks = context.size();
  const std::unique_ptr<Communicator> devices =
      make_device_communicator(context.world(), Transport::peer, 1);
  AttentionMask causal, window, documents;
  causal.causal = window.causal = documents.causal = true;
  window.window_left = 150;
  // Windows are used again, for fewer rows and for more, the same and other masks.
  for (const std::int64_t each : {500, 500, 130, 700}) {
    const std::int64_t seq = each * ranks + 3;
    const std::int64_t offsets[2][3] = {{0, seq / 3, seq}, {0, seq / 2 + 5, seq}};
    documents.q_segments = {segments_of_offsets(offsets[0], seq),
                            segments_of_offsets(offsets[1], seq)};
    documents.kv_segments = documents.q_segments;
    for (const AttentionMask& mask : {AttentionMask(), causal, window, documents}) {
      const auto request = request_of(ranks, seq, mask);
      const AttentionPlan plan(request, context.rank());
      DeviceShards shards(*request, context.rank(), kDim);
      shards.change(static_cast<std::uint64_t>(each + context.rank() * 8));
      shards.forward(*devices, plan);
      ExecutionReport report;
      ExecuteOptions joint, messages;
      joint.report = &report;
      messages.in_place = false;
      const std::vector<Tensor> expected = shards.backward(*devices, plan, messages);
      const std::vector<Tensor> found = shards.backward(*devices, plan, joint);
      if (devices->reach() == Communicator::Reach::everybody) {
        EXPECT_EQ(report.bytes_sent, 0);
        const AttentionSizes sizes{.head_dim = kDim, .value_dim = kDim};
        EXPECT_EQ(report.buffer_bytes,
                  backward_buffer_bytes(plan, sizes, {.in_place = true, .one_device = true}));
      }
      for (std::size_t i = 0; i < 3; ++i) {
        EXPECT_LE(largest_difference(found[i], expected[i]), 2e-4)
            << each << " rows a rank, result " << i << " of dQ, dK, dV";
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
