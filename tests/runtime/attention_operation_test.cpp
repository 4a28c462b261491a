#include "runtime/attention_operation.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "runtime/attention_setup.hpp"
#include "tests/runtime/operation_case.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

struct MeshCase {
  int ranks;
  const char* mesh;
};

constexpr MeshCase kMeshes[] = {{1, "sp=1"},          {2, "sp=2"},      {3, "tp=3"},
                                {4, "sp=2,tp=2"},     {4, "dp=2,sp=2"}, {6, "sp=3,tp=2"},
                                {8, "dp=2,sp=2,tp=2"}};

constexpr const char* kOperations[] = {"vanilla", "flash",  "sdpa", "ring",
                                       "ulysses", "splash", "auto"};

void on_every_mesh(const std::function<void(Context&, const Mesh&)>& body) {
  for (const MeshCase& m : kMeshes) {
    run_ranks(m.ranks, [&](Communicator& ranks) {
      Context context(ranks);
      body(context, Mesh::parse(m.mesh, m.ranks));
    });
  }
}

/// Everything at once: GQA, bias, dense mask, sinks, soft cap, dropout, documents, unequal widths.
OperationCase rich_case(std::int64_t bias_batch, std::int64_t bias_heads) {
  OperationCase c;
  c.shape = {.batch = 3,
             .seq_q = 37,
             .seq_kv = 53,
             .q_heads = 8,
             .kv_heads = 4,
             .head_dim = 16,
             .value_dim = 24,
             .bias = {bias_batch, bias_heads, 37, 53},
             .mask = {1, 1, 37, 53},
             .sinks = {8}};
  c.options.causal = true;
  c.options.mask.window_left = 30;
  c.options.mask.window_right = -1;
  c.options.scale = 0.3F;
  c.options.soft_cap = 2.0F;
  c.options.dropout = 0.2F;
  c.options.seed = 99;
  c.seed = 7;
  return c;
}

class RichAttention
    : public ::testing::TestWithParam<std::tuple<std::int64_t, std::int64_t, Placement>> {};

TEST_P(RichAttention, IsRightOnEveryMesh) {
  const auto [bias_batch, bias_heads, placement] = GetParam();
  const OperationCase c = rich_case(bias_batch, bias_heads);
  OperationTensors tensors = random_inputs(c);
  run_reference(c, tensors, true);
  on_every_mesh([&, place = placement](Context& context, const Mesh& mesh) {
    for (const char* operation : kOperations) {
      expect_forward(context, operation, mesh, c, tensors, 2e-5, place);
      expect_backward(context, operation, mesh, c, tensors, 1e-4, place);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Biases, RichAttention,
                         ::testing::Combine(::testing::Values(3, 1), ::testing::Values(8, 4, 1),
                                            ::testing::Values(Placement::working,
                                                              Placement::replicated)));

class Deals : public ::testing::TestWithParam<SequenceDeal> {};

TEST_P(Deals, GiveTheSameResults) {
  OperationCase c;
  c.shape = {.batch = 2,
             .seq_q = 101,
             .seq_kv = 101,
             .q_heads = 6,
             .kv_heads = 2,
             .head_dim = 16,
             .value_dim = 16};
  c.options.causal = true;
  c.options.deal = GetParam();
  OperationTensors tensors = random_inputs(c);
  run_reference(c, tensors, true);
  on_every_mesh([&](Context& context, const Mesh& mesh) {
    for (const char* operation : kOperations) {
      for (const Placement place : {Placement::working, Placement::replicated}) {
        expect_forward(context, operation, mesh, c, tensors, 2e-5, place);
        expect_backward(context, operation, mesh, c, tensors, 1e-4, place);
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(All, Deals,
                         ::testing::Values(SequenceDeal::contiguous, SequenceDeal::zigzag,
                                           SequenceDeal::balanced));

// Rows that lie one run a rank are computed where they lie, unless the balance is worth the way.
TEST(AttentionOperation, RowsAreDealtAnewWhereThatSavesMoreThanItCosts) {
  for (const auto& [seq, pays] : {std::pair<std::int64_t, bool>{1024, true}, {40, false}}) {
    OperationCase c;
    c.shape = {.batch = 1,
               .seq_q = seq,
               .seq_kv = seq,
               .q_heads = 2,
               .kv_heads = 1,
               .head_dim = 16,
               .value_dim = 16};
    c.options.causal = true;
    OperationTensors tensors = random_inputs(c);
    run_reference(c, tensors, true);
    run_ranks(4, [&, pays = pays](Communicator& group) {
      Context context(group);
      const Mesh mesh = Mesh::parse("sp=4", 4);
      expect_forward(context, "ring", mesh, c, tensors, 2e-5);
      expect_backward(context, "ring", mesh, c, tensors, 1e-4);
      OperationConfig config = on_the_host();
      config.mesh = mesh;
      const auto operation = OperationRegistry::create("ring", resolve_metadata(context, config));
      const AttentionLayouts layouts = operation->layouts(c.shape, c.options);
      const DistributedTensor query = spread(tensors.query, layouts.query, context.rank());
      const DistributedTensor key = spread(tensors.key, layouts.key, context.rank());
      const DistributedTensor value = spread(tensors.value, layouts.value, context.rank());
      const OperationOutput output = (*operation)({query, key, value}, c.options);
      EXPECT_TRUE(same_shards(output.attention_outputs.layout(), layouts.output));
      EXPECT_EQ(output.report.imbalance < 1.05, pays) << output.report.imbalance;
    });
  }
}

TEST(AttentionOperation, BlocksThatAreNotKeptAreNotSeen) {
  OperationCase c;
  c.shape = {.batch = 2,
             .seq_q = 60,
             .seq_kv = 60,
             .q_heads = 6,
             .kv_heads = 2,
             .head_dim = 16,
             .value_dim = 16};
  c.options.causal = true;
  c.options.mask.block_q = c.options.mask.block_kv = 8;
  for (int block = 0; block < 64; ++block) {
    c.options.mask.kept_blocks.push_back(block % 3 != 1 ? 1 : 0);
  }
  OperationTensors tensors = random_inputs(c);
  run_reference(c, tensors, true);
  on_every_mesh([&](Context& context, const Mesh& mesh) {
    for (const char* operation : kOperations) {
      expect_forward(context, operation, mesh, c, tensors, 2e-5);
      expect_backward(context, operation, mesh, c, tensors, 1e-4);
    }
  });
}

TEST(AttentionOperation, HybridFollowsTheNodes) {
  OperationCase c = rich_case(3, 8);
  OperationTensors tensors = random_inputs(c);
  run_reference(c, tensors, true);
  for (const int ranks_per_node : {1, 2, 4}) {
    for (const char* text : {"sp=4", "sp=8", "sp=4,tp=2", "dp=2,sp=4"}) {
      const int ranks = std::string_view(text) == "sp=4" ? 4 : 8;
      run_ranks(ranks,
                [&](Communicator& group) {
                  Context context(group);
                  const Mesh mesh = Mesh::parse(text, ranks);
                  expect_forward(context, "hybrid", mesh, c, tensors, 2e-5);
                  expect_backward(context, "hybrid", mesh, c, tensors, 1e-4);
                },
                {.ranks_per_node = ranks_per_node});
    }
  }
}

TEST(AttentionOperation, RowsWithoutKeysAreZeroWithALogSumOfMinusInfinity) {
  OperationCase c;
  c.shape = {.batch = 1,
             .seq_q = 40,
             .seq_kv = 11,
             .q_heads = 8,
             .kv_heads = 1,
             .head_dim = 16,
             .value_dim = 16};
  c.options.causal = true;  // bottom-right: the first 29 rows see nothing
  OperationTensors tensors = random_inputs(c);
  run_reference(c, tensors, false);
  const auto* lse = static_cast<const float*>(std::as_const(tensors.log_sum_exp).view().data);
  ASSERT_EQ(lse[28], -std::numeric_limits<float>::infinity());
  ASSERT_TRUE(std::isfinite(lse[29]));
  for (int ranks = 1; ranks <= 8; ++ranks) {
    run_ranks(ranks, [&](Communicator& group) {
      Context context(group);
      for (const char* operation : kOperations) {
        expect_forward(context, operation, Mesh({{"sp", ranks}}, ranks), c, tensors, 2e-5);
      }
    });
  }
}

/// The bits of O and LSE do not depend on the operation, the mesh or the deal.
TEST(AttentionOperation, ReproducibleGivesTheSameBitsEverywhere) {
  OperationCase c;
  c.shape = {.batch = 2,
             .seq_q = 700,
             .seq_kv = 700,
             .q_heads = 8,
             .kv_heads = 2,
             .head_dim = 16,
             .value_dim = 16};
  c.options.causal = true;
  c.options.reproducible = true;
  c.options.dropout = 0.1F;
  OperationTensors tensors = random_inputs(c);
  run_reference(c, tensors, false);
  run_ranks(1, [&](Communicator& ranks) {
    Context context(ranks);
    const auto op =
        OperationRegistry::create("ring", resolve_metadata(context, {.mesh = Mesh::standard(1)}));
    const AttentionLayouts layouts = op->layouts(c.shape, c.options);
    const DistributedTensor q = spread(tensors.query, layouts.query, 0);
    const DistributedTensor k = spread(tensors.key, layouts.key, 0);
    const DistributedTensor v = spread(tensors.value, layouts.value, 0);
    GatheredOutput whole = (*op)({q, k, v}, c.options).gather(context);
    EXPECT_LE(max_difference(whole.attention_outputs, tensors.output), 2e-5);
    tensors.output = std::move(whole.attention_outputs);
    tensors.log_sum_exp = std::move(whole.log_sum_exp);
  });
  constexpr MeshCase kReproducible[] = {{2, "sp=2"}, {3, "sp=3"},      {4, "sp=4"},
                                        {5, "sp=5"}, {4, "sp=2,tp=2"}, {4, "dp=2,sp=2"},
                                        {7, "sp=7"}, {8, "sp=8"}};
  for (const MeshCase& m : kReproducible) {
    for (const auto deal : {SequenceDeal::contiguous, SequenceDeal::zigzag}) {
      OperationCase dealt = c;
      dealt.options.deal = deal;
      run_ranks(m.ranks, [&](Communicator& ranks) {
        Context context(ranks);
        for (const char* operation : {"ring", "ulysses", "flash", "auto"}) {
          expect_forward(context, operation, Mesh::parse(m.mesh, m.ranks), dealt, tensors, 0.0);
        }
      });
    }
  }
}

bool same_bits(const Tensor& a, const Tensor& b) {
  const auto bytes = static_cast<std::size_t>(a.shape().elements() * size_bytes(a.dtype()));
  return a.shape() == b.shape() && std::memcmp(a.view().data, b.view().data, bytes) == 0;
}

/// Nor do those of the gradients.
TEST(AttentionOperation, ReproducibleGivesTheSameGradientsEverywhere) {
  OperationCase c;
  c.shape = {.batch = 2,
             .seq_q = 300,
             .seq_kv = 300,
             .q_heads = 8,
             .kv_heads = 2,
             .head_dim = 16,
             .value_dim = 8,
             .sinks = {8}};
  c.options.causal = true;
  c.options.reproducible = true;
  c.seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << c.seed);
  OperationTensors tensors = random_inputs(c);
  run_reference(c, tensors, true);
  WholeResults first;
  constexpr MeshCase kReproducible[] = {{1, "sp=1"},      {2, "sp=2"},      {3, "sp=3"},
                                        {4, "sp=2,tp=2"}, {4, "dp=2,sp=2"}, {5, "sp=5"},
                                        {7, "sp=7"},      {8, "sp=8"}};
  for (const MeshCase& m : kReproducible) {
    for (const auto deal : {SequenceDeal::contiguous, SequenceDeal::balanced}) {
      OperationCase dealt = c;
      dealt.options.deal = deal;
      run_ranks(m.ranks, [&](Communicator& ranks) {
        Context context(ranks);
        const Mesh mesh = Mesh::parse(m.mesh, m.ranks);
        for (const char* operation : {"ring", "ulysses", "vanilla", "auto"}) {
          WholeResults found =
              run_both_passes(context, operation, mesh, dealt, tensors, on_the_host());
          if (context.rank() != 0) continue;
          if (!first.output) {
            expect_backward(context, operation, mesh, dealt, tensors, 1e-4);
            first = std::move(found);
            continue;
          }
          const std::string what = std::string(operation) + " on " + m.mesh;
          EXPECT_TRUE(same_bits(found.grad_query, first.grad_query)) << what << ", dQ";
          EXPECT_TRUE(same_bits(found.grad_key, first.grad_key)) << what << ", dK";
          EXPECT_TRUE(same_bits(found.grad_value, first.grad_value)) << what << ", dV";
          EXPECT_TRUE(same_bits(found.grad_sinks, first.grad_sinks)) << what << ", sinks";
        }
      });
    }
  }
}

/// Rows of weights sum to 1 and, times V, give the output.
TEST(AttentionOperation, VanillaReturnsWeightsOnRequest) {
  OperationCase c;
  c.shape = {.batch = 2,
             .seq_q = 20,
             .seq_kv = 150,
             .q_heads = 4,
             .kv_heads = 2,
             .head_dim = 8,
             .value_dim = 8};
  c.options.causal = true;
  c.options.attention_weights = true;
  OperationTensors t = random_inputs(c);
  run_reference(c, t, false);
  on_every_mesh([&](Context& context, const Mesh& mesh) {
    const auto op = OperationRegistry::create("vanilla", resolve_metadata(context, {.mesh = mesh}));
    const AttentionLayouts layouts = op->layouts(c.shape, c.options);
    const DistributedTensor q = spread(t.query, layouts.query, context.rank());
    const DistributedTensor k = spread(t.key, layouts.key, context.rank());
    const DistributedTensor v = spread(t.value, layouts.value, context.rank());
    const GatheredOutput whole = (*op)({q, k, v}, c.options).gather(context);
    ASSERT_EQ(whole.attention_weights.shape(), (Shape{2, 4, 20, 150}));
    const auto* p = static_cast<const float*>(whole.attention_weights.view().data);
    const auto* values = static_cast<const float*>(std::as_const(t.value).view().data);
    const auto* o = static_cast<const float*>(std::as_const(t.output).view().data);
    for (std::int64_t row = 0; row < 2 * 4 * 20; ++row) {
      const std::int64_t b = row / 80, h = row / 20 % 4, i = row % 20;
      double sum = 0.0;
      double first = 0.0;
      for (std::int64_t j = 0; j < 150; ++j) {
        sum += p[row * 150 + j];
        first += static_cast<double>(p[row * 150 + j]) * values[((b * 150 + j) * 2 + h / 2) * 8];
        if (j > i + 130) {
          ASSERT_EQ(p[row * 150 + j], 0.0F);
        }
      }
      ASSERT_NEAR(sum, 1.0, 1e-5);
      ASSERT_NEAR(first, o[((b * 20 + i) * 4 + h) * 8], 2e-5);
    }
  });
  run_ranks(1, [&](Communicator& ranks) {
    Context context(ranks);
    EXPECT_THROW(expect_forward(context, "ring", Mesh::standard(1), c, t, 1.0), Error);
  });
}

TEST(AttentionOperation, ReadsOtherOrdersOfDimensions) {
  OperationCase c;
  c.shape = {.batch = 1,
             .seq_q = 30,
             .seq_kv = 30,
             .q_heads = 4,
             .kv_heads = 2,
             .head_dim = 8,
             .value_dim = 8};
  c.options.causal = true;
  OperationTensors t = random_inputs(c);
  run_reference(c, t, false);
  run_ranks(4, [&](Communicator& ranks) {
    Context context(ranks);
    const Mesh mesh = Mesh::parse("sp=2,tp=2", 4);
    const auto op = OperationRegistry::create("ring", resolve_metadata(context, {.mesh = mesh}));
    for (const DimOrder order : {DimOrder::bhtd, DimOrder::thd}) {
      AttentionOptions options = c.options;
      options.order = order;
      const AttentionShardings specs =
          op->metadata().partition_manager.get_shardings(Mode::train, order);
      const auto put = [&](const Tensor& whole, const PartitionSpec& spec) {
        const ConstTensorView view = whole.view();
        const Shape& n = view.shape;
        const Tensor ordered =
            order == DimOrder::bhtd
                ? Tensor::copy_of(view.transposed(1, 2))
                : Tensor::copy_of(ConstTensorView(view.data, DType::f32, {n[1], n[2], n[3]}));
        return spread(ordered, TensorLayout(ordered.shape(), NamedSharding(mesh, spec)),
                      context.rank());
      };
      const DistributedTensor q = put(t.query, specs.query);
      const DistributedTensor k = put(t.key, specs.key);
      const DistributedTensor v = put(t.value, specs.value);
      const GatheredOutput whole = (*op)({q, k, v}, options).gather(context);
      EXPECT_LE(max_difference(whole.attention_outputs, t.output), 2e-5) << name(order);
      EXPECT_LE(max_difference(whole.log_sum_exp, t.log_sum_exp), 2e-5) << name(order);
    }
  });
}

TEST(AttentionOperation, KeepsKeysAndValuesWhereACacheIsRequired) {
  OperationCase c;
  c.shape = {.batch = 1,
             .seq_q = 8,
             .seq_kv = 8,
             .q_heads = 2,
             .kv_heads = 2,
             .head_dim = 8,
             .value_dim = 8};
  const OperationTensors t = random_inputs(c);
  run_ranks(2, [&](Communicator& ranks) {
    Context context(ranks);
    const Mesh mesh = Mesh::parse("sp=2", 2);
    const OperationMetadata metadata = resolve_metadata(context, {.mesh = mesh});
    for (const bool cache : {false, true}) {
      const auto op = OperationRegistry::create("ring", metadata, cache);
      const AttentionLayouts layouts = op->layouts(c.shape, c.options);
      const DistributedTensor q = spread(t.query, layouts.query, context.rank());
      const DistributedTensor k = spread(t.key, layouts.key, context.rank());
      const DistributedTensor v = spread(t.value, layouts.value, context.rank());
      const OperationOutput output = (*op)({q, k, v}, c.options);
      ASSERT_EQ(output.cache_view.has_value(), cache);
      if (cache) {
        EXPECT_EQ(output.cache_view->key.global_shape(), t.key.shape());
        EXPECT_EQ(output.cache_view->value.layout(), layouts.value);
      }
      EXPECT_FALSE(output.attention_weights);
    }
  });
}

}  // namespace
}  // namespace annulus::testing
