#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <vector>

#include "runtime/context.hpp"
#include "runtime/peer_communicator.hpp"
#include "sharding/execution.hpp"
#include "sharding/memory_model.hpp"
#include "tests/runtime/device_shards.hpp"
#include "tests/sharding/case_table.hpp"

// Ulysses whose ranks read and write their own rows where they lie, held against heads that change
// hands in parts; ranks that share a device behave as if each had its own. Needs a GPU of the
// Hopper generation:
//   mpirun -n 4 build/test_mpi --gtest_filter='*DeviceOwnRows*'
namespace annulus::testing {
namespace {

constexpr std::int64_t kDim = 64;

struct Case {
  const char* name;
  SequenceLayout layout;
  AttentionMask mask;
  std::int64_t q_heads;
  std::int64_t kv_heads;
  std::int64_t batch = 1;
};

std::shared_ptr<PlanRequest> request_of(const Case& c) {
  auto request = std::make_shared<PlanRequest>();
  request->scheme = Scheme::ulysses;
  request->q_layout = request->kv_layout = c.layout;
  request->mask = make_slices(c.mask, c.batch, c.layout.seq(), c.layout.seq());
  request->batch = c.batch;
  request->q_heads = c.q_heads;
  request->kv_heads = c.kv_heads;
  return request;
}

AttentionMask documents(std::int64_t seq) {
  AttentionMask mask = causal_mask();
  const std::array<std::int64_t, 3> first{0, seq / 3, seq}, second{0, seq / 2 + 5, seq};
  mask.q_segments = {segments_of_offsets(first, seq), segments_of_offsets(second, seq)};
  mask.kv_segments = mask.q_segments;
  return mask;
}

std::vector<Case> cases_for(int ranks) {
  const std::int64_t seq = 700 * std::int64_t{ranks} + 3;
  const std::int64_t all = 4 * std::int64_t{ranks};
  const SequenceLayout zigzag = SequenceLayout::zigzag(seq, ranks);
  AttentionMask window = causal_mask();
  window.window_left = 150;
  std::vector<std::int64_t> rows(static_cast<std::size_t>(ranks), 640);
  rows.front() = 0;
  return {
      {"causal", zigzag, causal_mask(), 2 * all, all},
      {"full", zigzag, {}, all, all},
      {"KV heads of several ranks", zigzag, causal_mask(), all, 1},
      {"uneven heads", zigzag, causal_mask(), all + 6, (all + 6) / 2},
      {"window", SequenceLayout::contiguous(seq, ranks), window, all, all / 2},
      {"documents, batch of two", zigzag, documents(seq), all, all / 4, 2},
      {"a rank without rows", SequenceLayout::contiguous(rows), causal_mask(), all, all / 2},
  };
}

TEST(DeviceOwnRows, GetTheGradientsThatHeadsInPartsGet) {
  Context context;
  if (context.device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  if (context.size() == 1) GTEST_SKIP() << "one rank has no peers";
  const std::unique_ptr<Communicator> ranks =
      make_peer_communicator(context.world(), nullptr, PeerDevices::apart);
  ExecuteOptions in_parts;
  in_parts.one_launch = false;
  for (const Case& c : cases_for(context.size())) {
    const AttentionPlan plan(request_of(c), context.rank());
    for (const bool head_major : {false, true}) {
      DeviceShards shards(plan.request(), context.rank(), kDim, head_major);
      for (std::uint64_t call = 0; call < 3; ++call) {
        shards.change(static_cast<std::uint64_t>(context.rank()) * 100000 + call);
        shards.forward(*ranks, plan, in_parts);
        const std::vector<Tensor> expected = shards.backward(*ranks, plan, in_parts);
        ExecutionReport report;
        ExecuteOptions in_place;
        in_place.report = &report;
        const std::vector<Tensor> found = shards.backward(*ranks, plan, in_place);
        if (!head_major) {
          const AttentionSizes sizes{.head_dim = kDim, .value_dim = kDim};
          EXPECT_EQ(report.buffer_bytes, backward_buffer_bytes(plan, sizes, {.one_launch = true}))
              << c.name;
          EXPECT_EQ(report.bytes_sent, plan.backward_bytes(kDim, kDim, 2)) << c.name;
        }
        for (std::size_t i = 0; i < 3; ++i) {
          EXPECT_LE(largest_difference(found[i], expected[i]), 3e-4)
              << c.name << ", call " << call << ", result " << i << " of dQ, dK, dV"
              << (head_major ? ", heads before rows" : "");
        }
      }
    }
  }
}

TEST(DeviceOwnRows, WriteAnOutputWhoseHeadsComeBeforeItsRows) {
  Context context;
  if (context.device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  if (context.size() == 1) GTEST_SKIP() << "one rank has no peers";
  const std::unique_ptr<Communicator> ranks =
      make_peer_communicator(context.world(), nullptr, PeerDevices::apart);
  // Few thread blocks, which leave those of the other ranks room beside them.
  const Case c{"", SequenceLayout::zigzag(256 * std::int64_t{context.size()}, context.size()),
               causal_mask(), 8, 2};
  const AttentionPlan plan(request_of(c), context.rank());
  ExecuteOptions in_parts;
  in_parts.one_launch = false;
  DeviceShards shards(plan.request(), context.rank(), kDim, true);
  shards.change(static_cast<std::uint64_t>(context.rank()));
  const Tensor expected = shards.forward(*ranks, plan, in_parts);
  const Tensor found = shards.forward(*ranks, plan);
  EXPECT_LE(largest_difference(found, expected), 0x1p-7);
}

}  // namespace
}  // namespace annulus::testing
