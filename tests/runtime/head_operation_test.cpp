// Operations over heads that tp does not divide, with all that is counted by heads: biases of
// query heads and of KV heads, dense masks, sinks, dropout; forward and backward.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <string>
#include <tuple>

#include "kernels/error.hpp"
#include "tests/runtime/operation_case.hpp"
#include "tests/sharding/random_layout.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

struct Heads {
  std::int64_t query;
  std::int64_t kv;
  int tp;
};

constexpr std::array kHeads = {Heads{9, 3, 2}, Heads{9, 3, 3}, Heads{6, 2, 3}, Heads{6, 3, 2},
                               Heads{6, 2, 4}, Heads{2, 1, 4}, Heads{5, 1, 2}};

/// `pair_heads`: of bias and dense mask.
OperationCase case_of(const Heads& heads, std::int64_t pair_heads) {
  OperationCase c;
  c.shape = {.batch = 2,
             .seq_q = 19,
             .seq_kv = 26,
             .q_heads = heads.query,
             .kv_heads = heads.kv,
             .head_dim = 16,
             .value_dim = 8,
             .bias = {2, pair_heads, 19, 26},
             .mask = {2, pair_heads, 19, 26},
             .sinks = {heads.query}};
  c.options.causal = true;
  c.options.soft_cap = 20.0F;
  c.options.dropout = 0.1F;
  c.options.seed = 77;
  c.seed = fresh_seed() % 100'000;
  return c;
}

std::vector<std::string> meshes_of(int tp) {
  std::vector<std::string> meshes;
  for (const std::string other : {"sp=1", "sp=2", "sp=3", "dp=2,sp=1", "dp=2,sp=2"}) {
    meshes.push_back(fmt::format("{},tp={}", other, tp));
  }
  return meshes;
}

int ranks_of(const std::string& mesh) {
  int ranks = 1;
  for (std::size_t at = mesh.find('='); at != std::string::npos; at = mesh.find('=', at + 1)) {
    ranks *= mesh[at + 1] - '0';
  }
  return ranks;
}

/// Ulysses exchanges heads among the sequence ranks; with fewer heads it refuses.
bool heads_suffice(const Heads& heads, const Mesh& mesh) {
  for (int part = 0; part < heads.tp; ++part) {
    const std::int64_t count = split_evenly(heads.query, heads.tp, part).size();
    if (count > 0 && count < mesh.size("sp")) return false;
  }
  return true;
}

class HeadOperation : public ::testing::TestWithParam<std::tuple<const char*, Placement>> {};

void check(const std::string& operation, Placement placement, const Heads& heads,
           std::int64_t pair_heads) {
  const OperationCase c = case_of(heads, pair_heads);
  OperationTensors tensors = random_inputs(c);
  run_reference(c, tensors, true);
  for (const std::string& text : meshes_of(heads.tp)) {
    const int ranks = ranks_of(text);
    if (ranks > 8) continue;
    const Mesh mesh = Mesh::parse(text, ranks);
    if (operation == "ulysses" && !heads_suffice(heads, mesh)) continue;
    run_ranks(ranks, [&](Communicator& all) {
      Context context(all);
      expect_forward(context, operation, mesh, c, tensors, 2e-5, placement);
      expect_backward(context, operation, mesh, c, tensors, 1e-5, placement);
    });
  }
}

TEST_P(HeadOperation, EqualsTheDoubleReference) {
  const auto [operation, placement] = GetParam();
  for (const Heads& heads : kHeads) {
    for (const std::int64_t pair_heads : {heads.query, heads.kv, std::int64_t{1}}) {
      SCOPED_TRACE(fmt::format("heads {}:{} over tp={}, bias of {} heads", heads.query, heads.kv,
                               heads.tp, pair_heads));
      check(operation, placement, heads, pair_heads);
      if (HasFailure()) return;
    }
  }
}

std::string name_of(const ::testing::TestParamInfo<HeadOperation::ParamType>& param) {
  constexpr std::array kNames = {"working", "replicated", "by_spec"};
  const auto [operation, placement] = param.param;
  return fmt::format("{}_{}", operation, kNames[static_cast<std::size_t>(placement)]);
}

INSTANTIATE_TEST_SUITE_P(
    Operations, HeadOperation,
    ::testing::Combine(::testing::Values("ring", "ulysses", "flash", "sdpa", "vanilla"),
                       ::testing::Values(Placement::working, Placement::replicated,
                                         Placement::by_spec)),
    name_of);

TEST(HeadOperations, UlyssesRefusesFewerHeadsThanRanksOnAllOfThem) {
  const OperationCase c = case_of({7, 7, 2}, 1);  // 4 and 3 query heads
  const OperationTensors tensors = random_inputs(c);
  run_ranks(8, [&](Communicator& all) {
    Context context(all);
    try {
      expect_forward(context, "ulysses", Mesh::parse("sp=4,tp=2", 8), c, tensors, 2e-5);
      ADD_FAILURE() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::usage);
      EXPECT_NE(std::string_view(error.what()).find("4 ranks exchange heads but there are 3"),
                std::string_view::npos)
          << error.what();
    }
  });
}

TEST(HeadOperations, HeadsThatDoNotGroupAreRefused) {
  const OperationCase c = case_of({6, 4, 2}, 1);
  const OperationTensors tensors = random_inputs(c);
  run_ranks(2, [&](Communicator& all) {
    Context context(all);
    for (const char* operation : {"ring", "ulysses", "flash", "vanilla"}) {
      EXPECT_THROW(expect_forward(context, operation, Mesh::parse("tp=2", 2), c, tensors, 2e-5),
                   Error)
          << operation;
    }
  });
}

}  // namespace
}  // namespace annulus::testing
