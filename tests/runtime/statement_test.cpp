#include "runtime/statement.hpp"

#include <gtest/gtest.h>

#include "tests/runtime/operation_case.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

/// What every rank says; the same on all of them, or the test fails.
std::string said_by_all(int ranks, const std::function<void(Communicator&)>& body) {
  std::vector<std::string> said(static_cast<std::size_t>(ranks), "nothing");
  run_ranks(ranks, [&](Communicator& c) {
    try {
      body(c);
    } catch (const Error& error) {
      said[static_cast<std::size_t>(c.rank())] = error.what();
    }
  });
  for (const std::string& text : said) EXPECT_EQ(text, said.front());
  return said.front();
}

TEST(Statement, PassesAndTellsTheNumbersWhereAllAgree) {
  run_ranks(4, [](Communicator& c) {
    Statement statement("step");
    statement.add("rows", 12).add("scale", 0.5);
    const auto numbers = statement.agree(c, {c.rank(), 10 * c.rank()});
    for (std::int64_t rank = 0; rank < 4; ++rank) {
      EXPECT_EQ(numbers[static_cast<std::size_t>(rank)], (Statement::Numbers{rank, 10 * rank}));
    }
  });
}

TEST(Statement, NamesTheFieldTheValuesAndTheRanks) {
  EXPECT_EQ(
      said_by_all(
          6,
          [](Communicator& c) {
            Statement("ring").add("rows", 12).add("scale", c.rank() == 3 ? 0.25 : 0.125).agree(c);
          }),
      "ring: ranks were not started alike: scale is 0.125 on ranks 0-2, 4-5 but 0.25 on "
      "rank 3");
}

TEST(Statement, TellsAFailureOfOneRankToAll) {
  EXPECT_EQ(said_by_all(3,
                        [](Communicator& c) {
                          Statement statement("ring");
                          statement.add("rows", 12);
                          if (c.rank() == 1) statement.fail(ExitCode::no_memory, "ring: no memory");
                          if (c.rank() != 1) statement.add("plan", 5);
                          statement.agree(c);
                        }),
            "ring: no memory");
}

/// Calls ring on 4 ranks, where `change` may alter what one rank asks for.
std::string mismatch(const std::function<void(int, std::string&, OperationConfig&,
                                              AttentionOptions&, OperationCase&)>& change) {
  return said_by_all(4, [&](Communicator& ranks) {
    Context context(ranks);
    OperationCase c;
    c.shape = {.batch = 1,
               .seq_q = 16,
               .seq_kv = 16,
               .q_heads = 2,
               .kv_heads = 1,
               .head_dim = 8,
               .value_dim = 8};
    OperationConfig config{.mesh = Mesh::parse("sp=4", 4)};
    std::string name = "ring";
    change(context.rank(), name, config, c.options, c);
    const auto op = OperationRegistry::create(name, resolve_metadata(context, config));
    const AttentionLayouts layouts = op->layouts(c.shape, c.options);
    const OperationTensors t = random_inputs(c);
    const DistributedTensor q = spread(t.query, layouts.query, context.rank());
    const DistributedTensor k = spread(t.key, layouts.key, context.rank());
    const DistributedTensor v = spread(t.value, layouts.value, context.rank());
    (*op)({q, k, v}, c.options);
    EXPECT_EQ(context.bytes_sent(), 0) << "something was sent before the ranks were compared";
  });
}

TEST(OperationMismatch, IsRefusedBeforeAnythingIsSent) {
  using Options = AttentionOptions;
  EXPECT_EQ(
      mismatch([](int rank, std::string&, OperationConfig&, Options& options, OperationCase&) {
        if (rank == 3) options.scale = 0.25F;
      }),
      "ring: ranks were not started alike: scale is 0 on ranks 0-2 but 0.25 on rank 3");
  EXPECT_EQ(mismatch([](int rank, std::string&, OperationConfig&, Options& options,
                        OperationCase&) { options.causal = rank != 0; }),
            "ring: ranks were not started alike: causal is false on rank 0 but true on ranks 1-3");
  EXPECT_EQ(mismatch([](int rank, std::string&, OperationConfig& config, Options&, OperationCase&) {
              if (rank == 1) config.runtime_dtype = DType::bf16;
            }),
            "ring: ranks were not started alike: runtime dtype is f32 on ranks 0, 2-3 but bf16 on "
            "rank 1");
  EXPECT_NE(mismatch([](int rank, std::string&, OperationConfig&, Options&, OperationCase& c) {
              if (rank == 2) c.shape.seq_q = 20;
            }).find("query is f32 [1, 16, 2, 8]"),
            std::string::npos);
  EXPECT_NE(mismatch([](int rank, std::string&, OperationConfig&, Options&, OperationCase& c) {
              if (rank == 2) c.shape.kv_heads = 2;
            }).find("key is f32 [1, 16, 1, 8]"),
            std::string::npos);
  EXPECT_NE(
      mismatch([](int rank, std::string&, OperationConfig&, Options& options, OperationCase&) {
        if (rank == 2) options.mask.window_left = 4;
      }).find("mask is window -1,-1"),
      std::string::npos);
}

TEST(OperationMismatch, OfTheOperationItselfIsNamed) {
  std::vector<std::string> said(4);
  run_ranks(4, [&](Communicator& ranks) {
    Context context(ranks);
    OperationCase c;
    c.shape = {.batch = 1,
               .seq_q = 16,
               .seq_kv = 16,
               .q_heads = 2,
               .kv_heads = 1,
               .head_dim = 8,
               .value_dim = 8};
    OperationTensors t = random_inputs(c);
    const char* name = context.rank() == 0 ? "ulysses" : "ring";
    try {
      expect_forward(context, name, Mesh::parse("sp=4", 4), c, t, 1.0);
    } catch (const Error& error) {
      said[static_cast<std::size_t>(context.rank())] = error.what();
    }
  });
  EXPECT_EQ(said[0],
            "ulysses: ranks were not started alike: operation is ulysses on rank 0 but ring on "
            "ranks 1-3");
  EXPECT_EQ(said[1].substr(0, 35), "ring: ranks were not started alike:");
}

}  // namespace
}  // namespace annulus::testing
