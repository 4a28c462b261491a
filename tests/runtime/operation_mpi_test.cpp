// The operations against the double reference, with ranks as processes.

#include <gtest/gtest.h>
#include <mpi.h>

#include <chrono>
#include <string>
#include <vector>

#include "tests/runtime/operation_case.hpp"

namespace annulus::testing {
namespace {

constexpr const char* kOperations[] = {"ring", "ulysses", "flash", "sdpa"};

/// The first `ranks` processes as a group; the others sit out.
class OfRanks {
 public:
  explicit OfRanks(int ranks) {
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_split(MPI_COMM_WORLD, rank < ranks ? 0 : MPI_UNDEFINED, rank, &comm_);
  }
  ~OfRanks() {
    if (comm_ != MPI_COMM_NULL) MPI_Comm_free(&comm_);
  }
  OfRanks(const OfRanks&) = delete;
  OfRanks& operator=(const OfRanks&) = delete;
  bool member() const { return comm_ != MPI_COMM_NULL; }
  MpiHandle handle() const { return {MPI_Comm_c2f(comm_)}; }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
};

int world_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

std::vector<std::string> meshes_of(int ranks) {
  switch (ranks) {
    case 2:
      return {"sp=2", "dp=2"};
    case 3:
      return {"sp=3", "tp=3"};
    case 4:
      return {"sp=4", "sp=2,tp=2", "dp=2,sp=2"};
    case 6:
      return {"sp=6", "sp=2,tp=3"};
    default:
      return {"sp=" + std::to_string(ranks)};
  }
}

/// 3 ranks are tried besides, where there are more.
std::vector<int> rank_counts() {
  if (world_size() == 4) return {4, 3};
  return {world_size()};
}

/// Random inputs are the same on all ranks; rank 0 has the reference's results too.
OperationTensors tensors_of(const OperationCase& c, const Context& context, bool backward) {
  OperationTensors tensors = random_inputs(c);
  if (context.rank() == 0) run_reference(c, tensors, backward);
  return tensors;
}

void expect_equal(const std::vector<OperationCase>& cases, const MpiOptions& options = {}) {
  for (const int ranks : rank_counts()) {
    const OfRanks group(ranks);
    if (!group.member()) continue;
    Context context(group.handle(), options);
    for (const OperationCase& c : cases) {
      const OperationTensors tensors = tensors_of(c, context, false);
      for (const std::string& mesh : meshes_of(ranks)) {
        for (const char* operation : kOperations) {
          expect_forward(context, operation, Mesh::parse(mesh, ranks), c, tensors, 2e-5);
        }
      }
    }
  }
}

OperationCase case_of(std::int64_t seq_q, std::int64_t seq_kv, std::int64_t kv_heads,
                      std::int64_t head_dim, int mask) {
  OperationCase c;
  c.shape = {.batch = seq_q < 200 ? 3 : 1,
             .seq_q = seq_q,
             .seq_kv = seq_kv,
             .q_heads = 6,
             .kv_heads = kv_heads,
             .head_dim = head_dim,
             .value_dim = head_dim};
  c.options.causal = mask == 1;
  if (mask == 2) c.options.mask.window_left = 128, c.options.mask.window_right = 0;
  if (mask == 3) c.options.mask.window_left = c.options.mask.window_right = 512;
  c.seed = static_cast<std::uint64_t>(seq_q + 17 * kv_heads + 31 * head_dim + mask);
  return c;
}

constexpr std::int64_t kHeadDims[] = {32, 64, 96, 128, 256};
constexpr std::int64_t kKvHeads[] = {6, 2, 1};

TEST(Operations, EqualTheReferenceAtShortLengths) {
  constexpr std::int64_t kLengths[][2] = {{1, 1}, {64, 128}, {113, 203}, {239, 1}, {799, 3}};
  std::vector<OperationCase> cases;
  int turn = 0;
  for (const auto& length : kLengths) {
    for (const std::int64_t head_dim : kHeadDims) {
      for (int mask = 0; mask < 4; ++mask) {
        cases.push_back(case_of(length[0], length[1], kKvHeads[turn++ % 3], head_dim, mask));
      }
    }
  }
  expect_equal(cases);
}

TEST(Operations, EqualTheReferenceAtLongerLengths) {
  std::vector<OperationCase> cases;
  int turn = 0;
  for (const std::int64_t head_dim : kHeadDims) {
    cases.push_back(case_of(1023, 1024, kKvHeads[turn % 3], head_dim, turn % 4));
    ++turn;
  }
  constexpr std::int64_t kOffsets[] = {0, 120, 1248, 4232};
  OperationCase documents = case_of(4232, 4232, 2, 32, 1);
  documents.options.mask.q_segments = {segments_of_offsets(kOffsets, 4232)};
  documents.options.mask.kv_segments = documents.options.mask.q_segments;
  cases.push_back(documents);
  expect_equal(cases);
}

/// As those past 2 GB are.
TEST(Operations, SendMessagesInManyPieces) {
  expect_equal({case_of(113, 203, 2, 64, 0), case_of(239, 1, 6, 32, 1)}, {.chunk_bytes = 1024});
}

TEST(Operations, LeaveRowsWithoutKeysEmpty) {
  expect_equal({case_of(300, 7, 1, 32, 1), case_of(300, 7, 6, 32, 2)});
}

TEST(Operations, HaveTheGradientsOfTheReference) {
  OperationCase c = case_of(65, 130, 2, 32, 1);
  c.shape.bias = {1, 6, 65, 130};
  c.shape.sinks = {6};
  c.options.soft_cap = 3.0F;
  c.options.dropout = 0.1F;
  for (const int ranks : rank_counts()) {
    const OfRanks group(ranks);
    if (!group.member()) continue;
    Context context(group.handle());
    const OperationTensors tensors = tensors_of(c, context, true);
    for (const std::string& mesh : meshes_of(ranks)) {
      for (const char* operation : kOperations) {
        expect_backward(context, operation, Mesh::parse(mesh, ranks), c, tensors, 1e-4);
      }
    }
  }
}

TEST(Operations, RefuseRanksThatDifferWithinSeconds) {
  Context context;
  if (context.size() == 1) GTEST_SKIP() << "one rank cannot differ";
  const auto begin = std::chrono::steady_clock::now();
  OperationCase c = case_of(64, 64, 2, 32, 1);
  if (context.rank() == context.size() - 1) c.options.soft_cap = 30.0F;
  const OperationTensors tensors = tensors_of(c, context, false);
  std::string said;
  try {
    expect_forward(context, "ring", Mesh::parse(meshes_of(context.size())[0], context.size()), c,
                   tensors, 1.0);
  } catch (const Error& error) {
    said = error.what();
  }
  EXPECT_NE(said.find("ring: ranks were not started alike: soft cap is 0 on "), std::string::npos)
      << said;
  EXPECT_NE(said.find("but 30 on rank " + std::to_string(context.size() - 1)), std::string::npos)
      << said;
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
}

}  // namespace
}  // namespace annulus::testing
