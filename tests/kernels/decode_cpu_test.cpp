#include <fmt/format.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <functional>
#include <limits>

#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/targets.h"
// clang-format on
#include "kernels/cpu/bf16_dots.hpp"
#include "kernels/decode_attention.hpp"
#include "kernels/decode_case.hpp"
#include "kernels/element.hpp"

namespace annulus::testing {
namespace {

constexpr std::int64_t kPageSizes[] = {1, 4, 16, 128};

void expect_for_all_pages(const DecodeOptions& options, std::uint64_t seed) {
  const DecodeCase expected(options, seed);
  for (const std::int64_t page_size : kPageSizes) {
    SCOPED_TRACE(fmt::format("{}, pages of {}", options.to_string(), page_size));
    const PagedCache cache = expected.paged({}, page_size, seed + 1);
    expect_decode(expected, cache.problem(expected, {}), "cpu");
  }
}

// Queries and keys that other projects check their decode kernels with.
class DecodeCpu : public ::testing::TestWithParam<DecodeSequence> {};

TEST_P(DecodeCpu, EqualsTheReference) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    DecodeOptions options;
    options.dtype = dtype;
    options.sequences = {GetParam()};
    expect_for_all_pages(options, test_seed());
  }
}

TEST_P(DecodeCpu, EqualsTheReferenceBehindLeftPadding) {
  DecodeOptions options;
  options.dtype = DType::bf16;
  const DecodeSequence given = GetParam();
  options.sequences = {{given.rows, given.length, given.length / 3},
                       {given.rows, given.length, given.length - given.rows}};
  options.q_heads = 2;
  options.kv_heads = 1;
  expect_for_all_pages(options, test_seed());
}

INSTANTIATE_TEST_SUITE_P(Shapes, DecodeCpu,
                         ::testing::Values(DecodeSequence{1, 128}, DecodeSequence{1, 339},
                                           DecodeSequence{3, 1024}, DecodeSequence{64, 800},
                                           DecodeSequence{3, 799}, DecodeSequence{64, 2048},
                                           DecodeSequence{16, 20000}),
                         [](const auto& shape) {
                           return fmt::format("{}x{}", shape.param.rows, shape.param.length);
                         });

std::int64_t pick(std::mt19937_64& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

// Prefill and decode rows of ragged sequences, with every option.
DecodeOptions random_options(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  DecodeOptions options;
  options.dtype =
      std::array{DType::f32, DType::bf16, DType::f16}[static_cast<std::size_t>(pick(random, 0, 2))];
  options.kv_heads = pick(random, 1, 3);
  options.q_heads =
      options.kv_heads * std::array{1, 2, 3, 4, 7, 8}[static_cast<std::size_t>(pick(random, 0, 5))];
  options.head_dim = 8 * pick(random, 1, 20);
  options.latent = pick(random, 0, 3) == 0;
  options.value_dim =
      options.latent ? 8 * pick(random, 1, options.head_dim / 8) : 8 * pick(random, 1, 20);
  for (std::int64_t i = pick(random, 1, 5); i > 0; --i) {
    DecodeSequence sequence;
    sequence.length = pick(random, 0, 300);
    sequence.rows = std::min(sequence.length, pick(random, 0, 1) * pick(random, 0, 40) + 1);
    sequence.start = pick(random, 0, 2) == 0 ? pick(random, 0, sequence.length) : 0;
    options.sequences.push_back(sequence);
  }
  options.causal = pick(random, 0, 3) > 0;
  if (pick(random, 0, 2) == 0) options.window_left = pick(random, 0, 90);
  if (pick(random, 0, 3) == 0) options.window_right = pick(random, 0, 20);
  if (pick(random, 0, 9) == 0) options.window_right = std::numeric_limits<std::int64_t>::max();
  if (pick(random, 0, 3) == 0) options.soft_cap = 3.0F;
  options.sinks = pick(random, 0, 2) == 0;
  if (pick(random, 0, 5) == 0) options.spread = static_cast<float>(pick(random, -2, 1));
  return options;
}

TEST(DecodeCpuRandom, EqualsTheReference) {
  for (std::uint64_t i = 0; i < 60; ++i) {
    const std::uint64_t seed = test_seed() + i;
    SCOPED_TRACE(seed);
    expect_for_all_pages(random_options(seed), seed);
  }
}

TEST(DecodeCpuRandom, EqualsTheReferenceOnEveryVectorTarget) {
  hwy::SetSupportedTargetsForTest(0);
  const std::int64_t all = hwy::SupportedTargets() & HWY_TARGETS;
  for (std::int64_t left = all | HWY_STATIC_TARGET; left != 0; left &= left - 1) {
    const std::int64_t target = left & -left;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    SCOPED_TRACE(hwy::TargetName(target));
    for (std::uint64_t i = 0; i < 8; ++i) {
      const std::uint64_t seed = test_seed() + 1000 + i;
      SCOPED_TRACE(seed);
      expect_for_all_pages(random_options(seed), seed);
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

// Every way through the dot product, and none.
void for_each_way(const std::function<void()>& check) {
  using kernels::cpu::DotDecode;
  for (const DotDecode way : {DotDecode::pairs, DotDecode::heads}) {
    SCOPED_TRACE(fmt::format("way {}", static_cast<int>(way)));
    kernels::cpu::choose_dot_decode(way);
    check();
  }
  kernels::cpu::choose_dot_decode({});
  SCOPED_TRACE("no dots");
  kernels::cpu::allow_bf16_dots(false);
  check();
  kernels::cpu::allow_bf16_dots(true);
}

// Long enough for sums to settle, and every second case of a head size with loops of its own.
TEST(DecodeCpuRandom, EqualsTheReferenceWithAndWithoutDotProducts) {
  if (!kernels::cpu::has_bf16_dots()) GTEST_SKIP() << "no dot products of bf16 at full rate";
  for (std::uint64_t i = 0; i < 40; ++i) {
    const std::uint64_t seed = test_seed() + 2000 + i;
    SCOPED_TRACE(seed);
    DecodeOptions options = random_options(seed);
    options.dtype = i / 4 % 2 == 0 ? DType::bf16 : DType::f32;
    if (i % 2 == 0) {
      options.head_dim = options.value_dim = i % 4 == 0 ? 128 : 64;
      options.latent = false;
    }
    options.sequences.front().length += i % 3 == 0 ? 2200 : 400;
    for_each_way([&] { expect_for_all_pages(options, seed); });
  }
}

// Heads enough, and rows few enough, for keys and values to pass as streams of memory.
DecodeOptions streamed_options(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  DecodeOptions options = random_options(seed);
  options.latent = false;
  options.kv_heads = 4 * pick(random, 1, 2);
  options.head_dim = options.value_dim = options.kv_heads == 4 ? 128 : 64 * pick(random, 1, 2);
  const std::int64_t group = pick(random, 1, 4);
  options.q_heads = group * options.kv_heads;
  for (DecodeSequence& sequence : options.sequences) {
    sequence.rows = std::min(sequence.length, pick(random, 1, 4 / group));
  }
  return options;
}

TEST(DecodeCpuRandom, EqualsTheReferenceInStreams) {
  for (std::uint64_t i = 0; i < 24; ++i) {
    const std::uint64_t seed = test_seed() + 3000 + i;
    SCOPED_TRACE(seed);
    DecodeOptions options = streamed_options(seed);
    options.dtype = i % 2 == 0 ? DType::bf16 : DType::f32;
    options.spread = i % 3 == 0 ? 6.0F : options.spread;
    options.sequences.front().length += i % 4 == 0 ? 2200 : 100;
    kernels::cpu::choose_dot_decode(kernels::cpu::DotDecode::heads);
    expect_for_all_pages(options, seed);
    kernels::cpu::choose_dot_decode({});
  }
}

// Far above the maximum so far, which need not follow scores that exceed it by little.
TEST(DecodeCpu, EqualsTheReferenceWhereScoresRiseFar) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const float spread : {8.0F, 100.0F}) {  // by tens, and by more than an exponential holds
      DecodeOptions options;
      options.dtype = dtype;
      options.spread = spread;
      options.sequences = {{1, 3000}, {3, 700}};
      expect_for_all_pages(options, test_seed());
    }
  }
}

// The first tile, of which some rows see only a part, waits with its weights while others raise the
// maximum.
TEST(DecodeCpu, EqualsTheReferenceWhereScoresRiseBehindACutTile) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    DecodeOptions options;
    options.dtype = dtype;
    options.q_heads = options.kv_heads = 4;
    options.head_dim = options.value_dim = 128;
    options.spread = 8.0F;
    options.window_left = 100;
    options.sequences = {{4, 700}};
    kernels::cpu::choose_dot_decode(kernels::cpu::DotDecode::heads);
    expect_for_all_pages(options, test_seed());
    kernels::cpu::choose_dot_decode({});
  }
}

// O, then log-sum-exp.
std::vector<double> outputs(const DecodeProblem& problem, int threads) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  HostTensor o(problem.q.dtype, Shape{problem.tokens(), problem.q_heads(), problem.value_dim()},
               {0, 1, 2}, 0);
  HostTensor log_sum_exp(DType::f32, Shape{problem.q_heads(), problem.tokens()}, {0, 1}, 0);
  decode_forward({problem, {}, o.view(), log_sum_exp.view(), {}}, "cpu");
  omp_set_num_threads(before);
  std::vector<double> all = o.values();
  for (const double value : log_sum_exp.values()) all.push_back(value);
  return all;
}

void expect_same_bits(DecodeOptions options) {
  options.spread = 3.0F;
  options.sequences = {{1, 5000}, {2, 1700, 130}};
  const DecodeCase expected(options, test_seed());
  for (const std::int64_t page_size : kPageSizes) {
    SCOPED_TRACE(fmt::format("{}, pages of {}", options.to_string(), page_size));
    const PagedCache cache = expected.paged({}, page_size, test_seed());
    const DecodeProblem problem = cache.problem(expected, {});
    const std::vector<double> alone = outputs(problem, 64);  // every part a run of its own
    for (const int threads : {1, 2, 3}) EXPECT_EQ(outputs(problem, threads), alone) << threads;
  }
}

// Parts of the keys have states of their own, however many of them a thread takes in a row: the
// scores are so large that a maximum which a part has from the one before it would be seen.
TEST(DecodeCpu, HasTheSameBitsForAnyNumberOfThreads) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    DecodeOptions options;
    options.dtype = dtype;
    expect_same_bits(options);
    if (dtype == DType::f16) continue;
    options.kv_heads = 4;
    options.q_heads = 8;
    options.head_dim = options.value_dim = 128;
    kernels::cpu::choose_dot_decode(kernels::cpu::DotDecode::heads);
    expect_same_bits(options);
    kernels::cpu::choose_dot_decode({});
  }
  kernels::cpu::choose_dot_decode(kernels::cpu::DotDecode::pairs);
  DecodeOptions options;
  options.dtype = DType::bf16;
  expect_same_bits(options);
  kernels::cpu::choose_dot_decode({});
}

TEST(DecodeCpu, LatentOf512And64Columns) {
  DecodeOptions options;
  options.dtype = DType::bf16;
  options.q_heads = 16;
  options.kv_heads = 1;
  options.head_dim = 576;
  options.value_dim = 512;
  options.latent = true;
  options.sequences = {{1, 700}, {3, 130}, {1, 1}};
  expect_for_all_pages(options, test_seed());
}

// The last key is seen by the last query alone; its infinite value must not reach the others.
void expect_infinite_value_kept_out(const DecodeOptions& options) {
  const DecodeCase expected(options, test_seed());
  PagedCache cache = expected.paged({}, 16, test_seed());
  const DecodeProblem problem = cache.problem(expected, {});
  const std::int64_t key = options.sequences.front().length - 1;
  const std::int64_t page = cache.page_table[static_cast<std::size_t>(key / 16)];
  const TensorView last =
      cache.v.view().slice(0, {page, page + 1}).slice(1, {key % 16, key % 16 + 1});
  for (std::int64_t i = 0; i < options.kv_heads * options.value_dim; ++i) {
    store_element(last.data, options.dtype, i, std::numeric_limits<double>::infinity());
  }
  const std::int64_t queries = options.sequences.front().rows;
  HostTensor o(options.dtype, Shape{queries, options.q_heads, options.value_dim}, {0, 1, 2}, 0);
  decode_forward({problem, {}, o.view(), {}, {}}, "cpu");
  const std::vector<double> found = o.values();
  const double tolerance = options.dtype == DType::f32 ? 1e-5 : 0x1p-7;
  const std::size_t of_others =
      found.size() / static_cast<std::size_t>(queries) * static_cast<std::size_t>(queries - 1);
  for (std::size_t i = 0; i < of_others; ++i) ASSERT_NEAR(found[i], expected.o[i], tolerance);
  for (std::size_t i = of_others; i < found.size(); ++i) ASSERT_FALSE(std::isfinite(found[i])) << i;
}

// In a tile that ends with it and in one that it does not fill, of heads few and many.
TEST(DecodeCpu, KeepsInfiniteValuesOfMaskedKeysOut) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const std::int64_t length : {20, 32}) {
      for (const std::int64_t kv_heads : {2, 4}) {
        DecodeOptions options;
        options.dtype = dtype;
        options.kv_heads = kv_heads;
        options.head_dim = options.value_dim = 32 * kv_heads;
        options.sequences = {{4, length}};
        SCOPED_TRACE(options.to_string());
        for_each_way([&] { expect_infinite_value_kept_out(options); });
      }
    }
  }
}

// All scores of the row are NaN, the maximum of each of its parts too: merged or not, the row is.
void expect_nan_of_query_in_its_row(const DecodeOptions& options) {
  const auto decode = [&](const DecodeCase& of) {
    HostTensor o(options.dtype, Shape{1, options.q_heads, options.value_dim}, {0, 1, 2}, 0);
    const PagedCache cache = of.paged({}, 16, test_seed());
    decode_forward({cache.problem(of, {}), {}, o.view(), {}, {}}, "cpu");
    return o.values();
  };
  DecodeCase with_nan(options, test_seed());
  const std::vector<double> clean = decode(with_nan);
  std::vector<double> values = with_nan.q.values();
  values[static_cast<std::size_t>(options.head_dim)] = std::nan("");  // of head 1
  with_nan.q.fill(values);
  const std::vector<double> found = decode(with_nan);
  const double tolerance = options.dtype == DType::f32 ? 1e-5 : 0x1p-7;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (static_cast<std::int64_t>(i) / options.value_dim == 1) {
      ASSERT_TRUE(std::isnan(found[i])) << i << " " << found[i];
    } else {
      ASSERT_NEAR(found[i], clean[i], tolerance) << i;
    }
  }
}

TEST(DecodeCpu, KeepsTheNanOfAQueryInItsRow) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const std::int64_t kv_heads : {2, 4}) {
      DecodeOptions options;
      options.dtype = dtype;
      options.kv_heads = kv_heads;
      options.head_dim = options.value_dim = 32 * kv_heads;
      options.sequences = {{1, 700}};
      SCOPED_TRACE(options.to_string());
      for_each_way([&] { expect_nan_of_query_in_its_row(options); });
    }
  }
}

TEST(DecodeCpu, LeavesRowsOfNoSequenceAlone) {
  DecodeOptions options;
  options.sequences = {{1, 9}, {2, 12}};
  const DecodeCase expected(options, test_seed());
  PagedCache cache = expected.paged({}, 4, test_seed());
  cache.query_begin.back() = 2;  // the last row is nobody's, and sequence 1 has one
  HostTensor o(DType::f32, Shape{3, 4, 64}, {0, 1, 2}, 0);
  decode_forward({cache.problem(expected, {}), {}, o.view(), {}, {}}, "cpu");
  const std::vector<double> found = o.values();
  for (std::size_t i = 0; i < found.size(); ++i) ASSERT_EQ(std::isnan(found[i]), i >= 2 * 4 * 64);
}

}  // namespace
}  // namespace annulus::testing
