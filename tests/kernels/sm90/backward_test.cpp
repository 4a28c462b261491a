#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <thread>

#include "backward_problem.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/sm90/attention_sm90.hpp"

// The Hopper backward kernel against the double reference. Needs a Hopper GPU:
// build/test_kernels --gtest_filter='Sm90Backward*'; ANNULUS_FUZZ sets the number of shapes.
namespace annulus {
namespace {

class Sm90Backward : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no GPU here";
  }
};

std::int64_t pick(std::mt19937& random, std::initializer_list<std::int64_t> from) {
  return *(from.begin() + random() % from.size());
}

BackwardCase random_case(std::mt19937& random) {
  BackwardCase c{};
  c.batch = pick(random, {1, 1, 2, 3});
  c.seq_q = pick(random, {1, 3, 64, 113, 128, 200, 300});
  c.seq_kv = pick(random, {0, 1, 17, 128, 130, 256, 300});
  c.kv_heads = pick(random, {1, 2});
  c.q_heads = c.kv_heads * pick(random, {1, 1, 2, 5});
  c.head_dim = pick(random, {64, 96, 128, 192, 256});
  c.value_dim = c.head_dim == 192 && random() % 2 == 0 ? 128 : c.head_dim;
  c.dtype = random() % 2 == 0 ? DType::bf16 : DType::f16;
  c.soft_cap = random() % 5 == 0 ? 8.0F : 0.0F;
  c.sinks = random() % 4 == 0;
  c.steps = c.seq_kv < 8 ? 1 : static_cast<int>(pick(random, {1, 1, 2, 4}));
  c.unaligned = random() % 6 == 0;
  c.deterministic = random() % 3 == 0;
  c.overwrites_kv = random() % 2 == 0;
  return c;
}

void expect_right(const std::vector<std::unique_ptr<BackwardProblem>>& problems) {
  std::vector<std::thread> threads;
  for (const auto& problem : problems) threads.emplace_back([&problem] { problem->solve(); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& problem : problems) {
    problem->run();
    ASSERT_EQ(problem->failure(), "") << problem->words();
  }
}

void expect_right(const BackwardCase& c, std::vector<Slice> slices) {
  std::vector<std::unique_ptr<BackwardProblem>> one;
  one.push_back(std::make_unique<BackwardProblem>(c, std::move(slices), std::random_device{}()));
  expect_right(one);
}

TEST_F(Sm90Backward, MatchesTheReferenceOnRandomShapes) {
  const char* wanted = std::getenv("ANNULUS_FUZZ");
  const int shapes = wanted == nullptr ? 60 : std::atoi(wanted);
  const std::uint32_t seed = std::random_device{}();
  std::mt19937 random(seed);
  constexpr int kAtOnce = 16;
  for (int i = 0; i < shapes; i += kAtOnce) {
    SCOPED_TRACE(testing::Message() << "seed " << seed << " shapes from " << i);
    std::vector<std::unique_ptr<BackwardProblem>> problems;
    for (int j = i; j < std::min(i + kAtOnce, shapes); ++j) {
      const BackwardCase c = random_case(random);
      problems.push_back(
          std::make_unique<BackwardProblem>(c, random_slices(random, c.seq_q, c.seq_kv), random()));
    }
    expect_right(problems);
    if (HasFatalFailure()) return;
  }
}

// FlashAttention's list of lengths, by all head dimensions, causal and full.
TEST_F(Sm90Backward, MatchesTheReferenceOnFlashAttentionsShapes) {
  const std::initializer_list<std::pair<int, int>> lengths{
      {1, 1},     {64, 128},  {128, 192}, {256, 256}, {239, 1},
      {799, 3},   {113, 203}, {113, 128}, {128, 217}, {113, 211},
      {108, 256}, {256, 512}, {384, 256}, {640, 128}, {512, 256}};
  for (const auto& [head_dim, value_dim] : std::initializer_list<std::pair<int, int>>{
           {64, 64}, {96, 96}, {128, 128}, {192, 192}, {192, 128}, {256, 256}}) {
    std::vector<std::unique_ptr<BackwardProblem>> problems;
    for (const auto& [seq_q, seq_kv] : lengths) {
      for (const bool causal : {false, true}) {
        const BackwardCase c{1, seq_q, seq_kv, 2, 1, head_dim, value_dim, DType::bf16};
        problems.push_back(std::make_unique<BackwardProblem>(
            c,
            causal ? causal_slices(seq_q, seq_kv)
                   : std::vector<Slice>{{{0, seq_q}, {0, seq_kv}, {}}},
            std::random_device{}()));
      }
    }
    expect_right(problems);
    if (HasFatalFailure()) return;
  }
}

TEST_F(Sm90Backward, TakesEmptyTensorsAndMasks) {
  expect_right({1, 64, 0, 2, 2, 128, 128, DType::bf16}, {});
  expect_right({1, 0, 64, 2, 2, 128, 128, DType::bf16}, {});
  expect_right({1, 64, 64, 2, 2, 128, 128, DType::bf16}, {});  // no pair at all
  // Documents of no tokens between others, and one of one token.
  expect_right({1, 200, 200, 2, 2, 64, 64, DType::bf16}, {{{0, 0}, {0, 0}, {}},
                                                          {{0, 130}, {0, 130}, {-kUnbounded, 0}},
                                                          {{130, 130}, {130, 130}, {}},
                                                          {{130, 131}, {130, 131}, {}},
                                                          {{131, 200}, {131, 200}, {}}});
}

// hi = -1 leaves the first row without keys: its gradient is 0, and nothing becomes NaN.
TEST_F(Sm90Backward, RowsWithoutKeysHaveNoGradient) {
  for (const std::int64_t head_dim : {64, 128, 256}) {
    expect_right({2, 150, 150, 2, 2, head_dim, head_dim, DType::bf16},
                 {{{0, 150}, {0, 150}, {-kUnbounded, -1}}});
    expect_right({1, 300, 100, 2, 2, head_dim, head_dim, DType::bf16}, causal_slices(300, 100));
  }
}

// Tokens of no slice may hold NaN: it must not reach the others, nor their statistics.
TEST_F(Sm90Backward, KeepsForeignNumbersOut) {
  for (const std::int64_t head_dim : {64, 96, 128, 192, 256}) {
    const BackwardCase c{1, 230, 230, 2, 1, head_dim, head_dim, DType::bf16};
    const std::vector<Slice> slices{{{10, 80}, {10, 80}, {-kUnbounded, 0}},
                                    {{90, 220}, {90, 220}, {-kUnbounded, 0}}};
    std::vector<std::unique_ptr<BackwardProblem>> one;
    one.push_back(std::make_unique<BackwardProblem>(c, slices, std::random_device{}()));
    const BackwardProblem& problem = *one.front();
    one.front()->solve();
    for (const Span gap : {Span{0, 10}, Span{80, 90}, Span{220, 230}}) {
      for (const TensorView& view :
           {problem.q.view, problem.k.view, problem.v.view, problem.grad_o.view}) {
        const TensorView part = view.slice(1, gap);
        const std::vector<float> nan(static_cast<std::size_t>(part.shape.elements()), NAN);
        copy(ConstTensorView(nan.data(), DType::f32, part.shape), part);
      }
    }
    problem.run();
    EXPECT_EQ(problem.failure(), "") << problem.words();
  }
}

// A tile counter that a launch leaves behind, or a barrier out of phase, shows in the next one.
TEST_F(Sm90Backward, RepeatsAShortShape) {
  std::vector<std::unique_ptr<BackwardProblem>> one;
  one.push_back(std::make_unique<BackwardProblem>(
      BackwardCase{1, 70, 70, 1, 1, 128, 128, DType::bf16}, causal_slices(70, 70), 3U));
  one.front()->solve();
  for (int i = 0; i < 100; ++i) {
    one.front()->clear();
    one.front()->run();
    ASSERT_EQ(one.front()->failure(), "") << "launch " << i;
  }
}

TEST_F(Sm90Backward, AddsWhereAskedOnly) {
  std::vector<std::unique_ptr<BackwardProblem>> one;
  one.push_back(std::make_unique<BackwardProblem>(
      BackwardCase{1, 130, 130, 2, 1, 128, 128, DType::f16}, causal_slices(130, 130), 4U));
  const BackwardProblem& problem = *one.front();
  one.front()->solve();
  problem.run();
  BackwardCall call = problem.call();
  const std::vector<float> before = problem.grad_k.fetched();
  call.grad_q = {};
  call.grad_k = {};
  attention_backward(call, "sm90");
  EXPECT_EQ(problem.grad_k.fetched(), before);
}

// dK and dV are written whole, keys that nothing sees and blocks that end inside a box included.
TEST_F(Sm90Backward, OverwritesKeyGradients) {
  const Band causal{-kUnbounded, 0};
  const std::initializer_list<std::vector<Slice>> masks{
      {{{0, 300}, {0, 300}, causal}},
      {{{0, 192}, {0, 192}, causal}, {{192, 300}, {192, 300}, causal}},  // ends with half a block
      {{{0, 100}, {0, 100}, causal}, {{100, 300}, {100, 300}, causal}},  // ends inside a box
      {{{0, 300}, {0, 128}, {}}},                                        // keys without queries
      {{{0, 300}, {0, 300}, {-kUnbounded, -200}}},
      {}};
  for (const auto& [head_dim, value_dim] : std::initializer_list<std::pair<int, int>>{
           {64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}}) {
    std::vector<std::unique_ptr<BackwardProblem>> problems;
    for (const std::vector<Slice>& mask : masks) {
      for (const std::int64_t q_heads : {2, 4}) {
        BackwardCase c{2, 300, 300, q_heads, 2, head_dim, value_dim, DType::bf16};
        c.overwrites_kv = true;
        c.deterministic = q_heads == 4;  // one pass over the heads of a group
        problems.push_back(std::make_unique<BackwardProblem>(c, mask, std::random_device{}()));
      }
    }
    expect_right(problems);
    if (HasFatalFailure()) return;
  }
}

// Too few blocks of keys for the device: each is cut by its queries, of which the last are fewer.
TEST_F(Sm90Backward, AddsThePiecesOfACutPass) {
  for (const std::int64_t head_dim : {64, 96, 128}) {
    std::vector<std::unique_ptr<BackwardProblem>> problems;
    for (const bool overwrites : {false, true}) {
      BackwardCase c{2, 1000, 300, 2, 2, head_dim, head_dim, DType::bf16};
      c.overwrites_kv = overwrites;
      const std::vector<Slice> full{{{0, 1000}, {0, 300}, {}}};
      problems.push_back(std::make_unique<BackwardProblem>(c, full, std::random_device{}()));
    }
    expect_right(problems);
    if (HasFatalFailure()) return;
  }
}

// A slice none of whose queries sees a block of keys, though a block of queries begins before both.
TEST_F(Sm90Backward, DeterministicModePassesOverSlicesWithoutPairs) {
  for (const std::int64_t head_dim : {64, 96, 128, 192, 256}) {
    BackwardCase c{1, 3, 75, 4, 2, head_dim, head_dim, DType::bf16};
    c.deterministic = true;
    expect_right(c, {{{0, 1}, {0, 75}, {}}, {{1, 3}, {0, 75}, {-kUnbounded, -3}}});
  }
}

int repeats_wanted() {
  const char* wanted = std::getenv("ANNULUS_REPEATS");
  return wanted == nullptr ? 50 : std::atoi(wanted);
}

/// The same bits each time.
void expect_same_gradients(const BackwardCase& c, const std::vector<Slice>& slices) {
  const BackwardProblem problem(c, slices, 5U);
  std::vector<float> rows(static_cast<std::size_t>(problem.row_shape.elements()), 5.0F);
  copy(ConstTensorView(rows.data(), DType::f32, problem.row_shape), problem.lse.view());
  copy(ConstTensorView(rows.data(), DType::f32, problem.row_shape), problem.delta.view());
  attention_backward(problem.call(), "sm90");
  const std::vector<float> q = problem.grad_q.fetched();
  const std::vector<float> k = problem.grad_k.fetched();
  const std::vector<float> v = problem.grad_v.fetched();
  for (int i = 0; i < repeats_wanted(); ++i) {
    problem.clear();
    attention_backward(problem.call(), "sm90");
    ASSERT_EQ(problem.grad_q.fetched(), q) << "repeat " << i;
    ASSERT_EQ(problem.grad_k.fetched(), k) << "repeat " << i;
    ASSERT_EQ(problem.grad_v.fetched(), v) << "repeat " << i;
  }
}

// Deterministic mode gives the same bits, whatever order the blocks finish in.
TEST_F(Sm90Backward, DeterministicModeRepeatsBitForBit) {
  for (const std::int64_t head_dim : {64, 128, 256}) {
    BackwardCase c{2, 700, 700, 8, 2, head_dim, head_dim, DType::bf16};
    c.deterministic = true;
    expect_same_gradients(c, causal_slices(700, 700));
    if (HasFatalFailure()) return;
  }
}

// A pair of blocks of keys that alone adds to its queries: what one overwrites before the other has
// read it shows.
TEST_F(Sm90Backward, RepeatsOnePairOfBlocksBitForBit) {
  for (const std::int64_t seq_kv : {70, 128}) {
    const BackwardCase c{1, 500, seq_kv, 70, 70, 256, 256, DType::bf16};
    expect_same_gradients(c, {{{0, 500}, {0, seq_kv}, {}}});
    if (HasFatalFailure()) return;
  }
}

// Offsets past 2^31 elements: the last head's gradients must not land in another's.
TEST_F(Sm90Backward, ReachesPastTwoToThe31Elements) {
  const std::int64_t tokens = 140000;
  const std::int64_t heads = 128;
  const auto token = [&](const TensorView& view, std::int64_t row) {
    return view.slice(1, {row, row + 1}).slice(2, {heads - 1, heads});
  };
  Buffer zeros[3];
  TensorView grads[3];
  Buffer inputs(Device::cuda, tokens * heads * 128 * 2);
  fill_bytes(inputs.data(), Device::cuda, 0x3c, inputs.bytes());  // 0.0115 everywhere
  const Shape shape{1, tokens, heads, 128};
  for (int i = 0; i < 3; ++i) {
    zeros[i] = Buffer(Device::cuda, shape.elements() * 4);
    fill_bytes(zeros[i].data(), Device::cuda, 0, zeros[i].bytes());
    grads[i] = {zeros[i].data(), DType::f32, shape, Device::cuda};
  }
  const DeviceFloats rows(Shape{1, heads, tokens});
  fill_bytes(rows.memory.data(), Device::cuda, 0, rows.memory.bytes());
  const std::vector<Slice> slices{
      {{tokens - 1, tokens}, {tokens - 1, tokens}, {}}};  // one pair, at the far end
  BackwardCall call;
  call.problem.q = call.problem.k = call.problem.v =
      call.grad_o = {inputs.data(), DType::bf16, shape, Device::cuda};
  call.problem.mask = {slices, {}};
  call.log_sum_exp = call.delta = rows.view();
  call.grad_q = grads[0];
  call.grad_k = grads[1];
  call.grad_v = grads[2];
  attention_backward(call, "sm90");
  std::vector<float> row(128);
  for (const TensorView& grad : grads) {
    copy(token(grad, tokens - 1), TensorView(row.data(), DType::f32, Shape{1, 1, 1, 128}));
    EXPECT_GT(row[127], 0.0F);
    copy(token(grad, tokens - 2), TensorView(row.data(), DType::f32, Shape{1, 1, 1, 128}));
    EXPECT_EQ(row[127], 0.0F);
  }
}

TEST_F(Sm90Backward, NamesWhatItDoesNotSupport) {
  const BackwardProblem problem({1, 64, 64, 2, 2, 64, 64, DType::bf16}, causal_slices(64, 64), 6U);
  const AttentionBackend& sm90 = kernels::sm90::backends().front();
  const AttentionProblem good = problem.call().problem;
  EXPECT_EQ(sm90.unsupported(good, Direction::backward), "");
  const auto expect_named = [&](const AttentionProblem& bad, const char* word) {
    EXPECT_NE(sm90.unsupported(bad, Direction::backward).find(word), std::string::npos) << word;
  };
  AttentionProblem bad = good;
  bad.dropout.probability = 0.5F;
  expect_named(bad, "dropout");
  bad = good;
  bad.bias = bad.q;
  expect_named(bad, "bias");
  bad = good;
  bad.dense_mask = bad.q;
  expect_named(bad, "mask");
  bad = good;
  bad.q.dtype = bad.k.dtype = bad.v.dtype = DType::f32;
  expect_named(bad, "f32");
  bad = good;
  bad.q.shape[3] = bad.k.shape[3] = bad.v.shape[3] = 80;
  expect_named(bad, "80");
}

}  // namespace
}  // namespace annulus
