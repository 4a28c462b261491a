// ring, ulysses, flash and vanilla against the double reference, with ranks as threads.

#include <gtest/gtest.h>

#include <tuple>

#include "tests/runtime/operation_case.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

constexpr double kTolerance = 2e-5;

struct MeshCase {
  int ranks;
  const char* mesh;
};

constexpr MeshCase kMeshes[] = {{1, "sp=1"},      {2, "sp=2"},      {3, "sp=3"},
                                {4, "sp=4"},      {6, "sp=6"},      {3, "tp=3"},
                                {4, "sp=2,tp=2"}, {4, "dp=2,sp=2"}, {6, "sp=2,tp=3"}};

constexpr const char* kOperations[] = {"ring", "ulysses", "flash"};

AttentionOptions options_of(int mask) {
  AttentionOptions options;
  options.causal = mask == 1;
  if (mask == 2) options.mask.window_left = 128, options.mask.window_right = 0;
  if (mask == 3) options.mask.window_left = 512, options.mask.window_right = 512;
  return options;
}

void expect_equal_everywhere(const OperationCase& c) {
  OperationTensors tensors = random_inputs(c);
  run_reference(c, tensors, false);
  for (const MeshCase& m : kMeshes) {
    run_ranks(m.ranks, [&](Communicator& ranks) {
      Context context(ranks);
      const Mesh mesh = Mesh::parse(m.mesh, m.ranks);
      for (const char* operation : kOperations) {
        SCOPED_TRACE(operation);
        expect_forward(context, operation, mesh, c, tensors, kTolerance);
      }
    });
  }
}

using Length = std::pair<std::int64_t, std::int64_t>;

class OperationEquality : public ::testing::TestWithParam<std::tuple<Length, std::int64_t>> {};

TEST_P(OperationEquality, WithTheDoubleReference) {
  const auto [length, head_dim] = GetParam();
  std::uint64_t seed = ::testing::UnitTest::GetInstance()->random_seed() + 1;
  for (const std::int64_t kv_heads : {6, 2, 1}) {
    for (int mask = 0; mask < 4; ++mask) {
      // Short lengths have a batch that data-parallel ranks share, and one left over.
      const AttentionShape shape{.batch = length.first < 200 ? 3 : 1,
                                 .seq_q = length.first,
                                 .seq_kv = length.second,
                                 .q_heads = 6,
                                 .kv_heads = kv_heads,
                                 .head_dim = head_dim,
                                 .value_dim = head_dim};
      expect_equal_everywhere({shape, options_of(mask), ++seed});
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, OperationEquality,
                         ::testing::Combine(::testing::Values(Length{1, 1}, Length{64, 128},
                                                              Length{113, 203}, Length{239, 1},
                                                              Length{799, 3}, Length{1023, 1024}),
                                            ::testing::Values(32, 64, 96, 128, 256)));

class OperationDocuments : public ::testing::TestWithParam<std::tuple<int, bool>> {};

TEST_P(OperationDocuments, EqualTheDoubleReference) {
  const auto [kv_heads, causal] = GetParam();
  constexpr std::int64_t kOffsets[] = {0, 120, 1248, 4232};
  AttentionOptions options;
  options.causal = causal;
  options.mask.q_segments = {segments_of_offsets(kOffsets, 4232)};
  options.mask.kv_segments = options.mask.q_segments;
  const AttentionShape shape{.batch = 1,
                             .seq_q = 4232,
                             .seq_kv = 4232,
                             .q_heads = 6,
                             .kv_heads = kv_heads,
                             .head_dim = 32,
                             .value_dim = 32};
  expect_equal_everywhere({shape, options, 5});
}

INSTANTIATE_TEST_SUITE_P(Heads, OperationDocuments,
                         ::testing::Combine(::testing::Values(6, 2, 1), ::testing::Bool()));

}  // namespace
}  // namespace annulus::testing
