#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "kernels/buffer.hpp"
#include "sharding/case_table.hpp"

namespace annulus {
namespace {

using namespace testing;

// What must hold of any exact attention, whatever computes it.
class Metamorphic : public ::testing::TestWithParam<Scheme> {
 protected:
  static constexpr int kRanks = 4;

  AttentionTensors run(const AttentionCase& c, AttentionTensors tensors) const {
    auto request = request_of(c, GetParam(), SequenceLayout::zigzag(c.seq_q, kRanks),
                              SequenceLayout::zigzag(c.seq_kv, kRanks));
    request->node_ranks = 2;
    RunOptions options;
    options.backward = false;
    run_on_threads(c, request, tensors, options);
    return tensors;
  }

  std::uint64_t seed_ = fresh_random_seed();
};

// Rows [rows) of one sequence-major tensor.
std::span<float> rows_of(HostTensor& t, std::int64_t begin, std::int64_t end) {
  const auto row = static_cast<std::size_t>(t.view.shape[2] * t.view.shape[3]);
  return std::span(t.data).subspan(static_cast<std::size_t>(begin) * row,
                                   static_cast<std::size_t>(end - begin) * row);
}

void fill(std::span<float> values, float value) { std::fill(values.begin(), values.end(), value); }

TEST_P(Metamorphic, KeysCanBePermuted) {
  const AttentionCase c = make_case("full", {}, 90);
  AttentionTensors tensors = random_tensors(c, seed_);
  const AttentionTensors expected = run(c, tensors);
  std::vector<std::int64_t> order(90);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(seed_));
  const AttentionTensors original = tensors;
  for (std::int64_t i = 0; i < 90; ++i) {
    const std::int64_t from = order[static_cast<std::size_t>(i)];
    copy(original.k.view.slice(1, {from, from + 1}), tensors.k.view.slice(1, {i, i + 1}));
    copy(original.v.view.slice(1, {from, from + 1}), tensors.v.view.slice(1, {i, i + 1}));
  }
  const AttentionTensors found = run(c, tensors);
  EXPECT_LE(max_difference(found.o, expected.o), 2e-5) << "seed " << seed_;
  EXPECT_LE(max_difference(found.lse, expected.lse), 2e-5) << "seed " << seed_;
}

TEST_P(Metamorphic, AConstantOnARowsLogitsMovesOnlyItsLse) {
  AttentionCase c = make_case("bias", causal_mask(), 60);
  c.bias = true;
  AttentionTensors tensors = random_tensors(c, seed_);
  const AttentionTensors before = run(c, tensors);
  for (std::int64_t h = 0; h < c.q_heads; ++h) {
    for (std::int64_t q = 0; q < 60; ++q) {
      for (std::int64_t k = 0; k < 60; ++k) {
        tensors.bias.data[static_cast<std::size_t>((h * 60 + q) * 60 + k)] +=
            static_cast<float>(q % 5);
      }
    }
  }
  const AttentionTensors after = run(c, tensors);
  EXPECT_LE(max_difference(after.o, before.o), 2e-5) << "seed " << seed_;
  for (std::size_t i = 0; i < after.lse.data.size(); ++i) {
    EXPECT_NEAR(after.lse.data[i] - before.lse.data[i], static_cast<float>(i % 60 % 5), 2e-5);
  }
}

TEST_P(Metamorphic, OutputIsLinearInValues) {
  const AttentionCase c = make_case("window", window_mask(30, 4), 77);
  AttentionTensors a = random_tensors(c, seed_);
  AttentionTensors b = a;
  b.v = random_tensors(c, seed_ + 1).v;
  AttentionTensors sum = a;
  for (std::size_t i = 0; i < sum.v.data.size(); ++i) {
    sum.v.data[i] = 2.0F * a.v.data[i] + b.v.data[i];
  }
  a = run(c, a);
  b = run(c, b);
  sum = run(c, sum);
  for (std::size_t i = 0; i < sum.o.data.size(); ++i) {
    EXPECT_NEAR(sum.o.data[i], 2.0F * a.o.data[i] + b.o.data[i], 2e-5) << "seed " << seed_;
  }
}

TEST_P(Metamorphic, ValuesOfOneGiveOneAndOutputsStayInTheValuesRange) {
  const AttentionCase c = make_case("causal", causal_mask(), 85, 2);
  AttentionTensors tensors = random_tensors(c, seed_);
  const AttentionTensors random = run(c, tensors);
  const auto [low, high] = std::minmax_element(tensors.v.data.begin(), tensors.v.data.end());
  for (const float value : random.o.data) {
    EXPECT_GE(value, *low - 1e-5F);
    EXPECT_LE(value, *high + 1e-5F);
  }
  fill(tensors.v.data, 1.0F);
  for (const float value : run(c, tensors).o.data) EXPECT_NEAR(value, 1.0F, 2e-6F);
}

TEST_P(Metamorphic, FutureKeysAndValuesDoNotTouchCausalRows) {
  const AttentionCase c = make_case("causal", causal_mask(), 96);
  AttentionTensors tensors = random_tensors(c, seed_);
  AttentionTensors before = run(c, tensors);
  const std::int64_t now = 41;
  fill(rows_of(tensors.k, now, 96), std::numeric_limits<float>::quiet_NaN());
  fill(rows_of(tensors.v, now, 96), std::numeric_limits<float>::quiet_NaN());
  AttentionTensors after = run(c, tensors);
  const std::span<float> old_rows = rows_of(before.o, 0, now);
  EXPECT_TRUE(std::equal(old_rows.begin(), old_rows.end(), rows_of(after.o, 0, now).begin()))
      << "seed " << seed_;
}

// Rows of `t` outside of a document, in all tensors with a row for each token.
void expect_other_rows_unchanged(HostTensor& after, HostTensor& before, Span document,
                                 std::int64_t seq, const char* what) {
  for (const Span other : {Span{0, document.begin}, Span{document.end, seq}}) {
    const std::span<float> old_rows = rows_of(before, other.begin, other.end);
    const std::span<float> rows = rows_of(after, other.begin, other.end);
    EXPECT_EQ(std::memcmp(rows.data(), old_rows.data(), rows.size_bytes()), 0) << what;
  }
}

// However rows lie, in both passes: one token of one document is given other values. Forward they
// may also be no numbers.
TEST_P(Metamorphic, OneDocumentsTokensTouchNoOtherDocument) {
  const std::int64_t seq = 296;
  const std::vector<std::int64_t> offsets{0, 20, 171, 175, 230, 231, seq};
  const AttentionCase c = make_case("documents", document_mask(offsets, seq), seq);
  const AttentionTensors given = random_tensors(c, seed_);
  const Span document{20, 171};
  const std::int64_t token = 20 + static_cast<std::int64_t>(seed_ % 151);
  for (const SequenceLayout& layout : layouts(c, seq, kRanks)) {
    for (const bool in_place : {true, false}) {
      for (const std::int64_t block_rows : {0, 128}) {
        SCOPED_TRACE(::testing::Message()
                     << "seed " << seed_ << ", token " << token << ", blocks of " << block_rows
                     << (in_place ? ", in place" : ""));
        auto request = request_of(c, GetParam(), layout, layout);
        request->node_ranks = 2;
        request->block_rows = block_rows;
        RunOptions options;
        options.execute.in_place = in_place;
        AttentionTensors before = given;
        run_on_threads(c, request, before, options);
        for (const float value : {7.0F, std::numeric_limits<float>::quiet_NaN()}) {
          AttentionTensors after = given;
          for (HostTensor* t : {&after.q, &after.k, &after.v, &after.grad_o}) {
            fill(rows_of(*t, token, token + 1), value);
          }
          options.backward = !std::isnan(value);
          run_on_threads(c, request, after, options);
          expect_other_rows_unchanged(after.o, before.o, document, seq, "O");
          if (!options.backward) continue;
          expect_other_rows_unchanged(after.grad_q, before.grad_q, document, seq, "dQ");
          expect_other_rows_unchanged(after.grad_k, before.grad_k, document, seq, "dK");
          expect_other_rows_unchanged(after.grad_v, before.grad_v, document, seq, "dV");
          EXPECT_GT(max_difference(after.o, before.o), 1e-3);
        }
      }
    }
  }
}

TEST_P(Metamorphic, KeysTwiceAddLnTwoToLse) {
  AttentionCase c = make_case("full", {}, 50);
  AttentionTensors once = random_tensors(c, seed_);
  c.seq_kv = 100;
  AttentionTensors twice = random_tensors(c, seed_);
  twice.q = once.q;
  for (const Span half : {Span{0, 50}, Span{50, 100}}) {
    copy(once.k.view, twice.k.view.slice(1, half));
    copy(once.v.view, twice.v.view.slice(1, half));
  }
  twice = run(c, twice);
  c.seq_kv = 50;
  once = run(c, once);
  EXPECT_LE(max_difference(twice.o, once.o), 2e-5) << "seed " << seed_;
  for (std::size_t i = 0; i < once.lse.data.size(); ++i) {
    EXPECT_NEAR(twice.lse.data[i] - once.lse.data[i], std::log(2.0F), 2e-5F);
  }
}

INSTANTIATE_TEST_SUITE_P(EveryScheme, Metamorphic,
                         ::testing::Values(Scheme::ring, Scheme::all_gather, Scheme::ulysses,
                                           Scheme::hybrid),
                         [](const auto& info) { return std::string(name(info.param)); });

}  // namespace
}  // namespace annulus
