#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>

#include "sharding/attention_case.hpp"
#include "sharding/block_forward.hpp"
#include "sharding/case_table.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus {
namespace {

using namespace testing;

// Every `stride`-th combination from a random one on; all of them in the heavy run.
void run_matrix(const std::vector<AttentionCase>& cases, std::size_t stride) {
  const std::uint64_t seed = fresh_random_seed();
  if (std::getenv("ANNULUS_FULL_MATRIX") != nullptr) stride = 1;
  const std::size_t first = seed % stride;
  std::size_t number = 0;
  for (const AttentionCase& c : cases) {
    AttentionTensors expected = random_tensors(c, seed);
    run_reference(c, expected);
    AttentionTensors found = random_tensors(c, seed);
    for (const int ranks : {1, 2, 3, 4, 5, 6, 8}) {
      const auto q_layouts = layouts(c, c.seq_q, ranks);
      const auto kv_layouts = layouts(c, c.seq_kv, ranks);
      for (std::size_t i = 0; i < q_layouts.size(); ++i) {
        for (const Choice& choice : choices(ranks)) {
          for (const bool in_place : {true, false}) {
            if (number++ % stride != first) continue;
            SCOPED_TRACE(::testing::Message()
                         << c.name << ", seed " << seed << ", " << ranks << " ranks, layout " << i
                         << ", " << name(choice.scheme) << " " << choice.node_ranks
                         << (in_place ? ", in place" : ", messages"));
            auto request =
                request_of(c, choice.scheme, q_layouts[i], kv_layouts[i % kv_layouts.size()]);
            request->node_ranks = choice.node_ranks;
            request->stage_rows = number % 3 == 0 ? 30 : 0;
            RunOptions options;
            options.execute.in_place = in_place;
            options.execute.head_parts = static_cast<int>(number % 4);
            options.ranks_per_node = number % 2 == 0 ? 2 : 0;
            ASSERT_NO_THROW(run_on_threads(c, request, found, options));
            expect_equal(c, found, expected);
            if (::testing::Test::HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(Schemes, EqualTheReferenceForEveryMask) { run_matrix(mask_cases(), 7); }

TEST(Schemes, EqualTheReferenceForEveryFeature) { run_matrix(feature_cases(), 5); }

TEST(Schemes, EqualTheReferenceForOddLengths) {
  for (const AttentionCase& c : length_cases(std::getenv("ANNULUS_FULL_MATRIX") != nullptr)) {
    const std::uint64_t seed = fresh_random_seed();
    AttentionTensors expected = random_tensors(c, seed);
    run_reference(c, expected);
    AttentionTensors found = random_tensors(c, seed);
    const bool full = std::getenv("ANNULUS_FULL_MATRIX") != nullptr;
    for (const int ranks : full ? std::vector<int>{1, 2, 3, 4, 5, 6, 8} : std::vector<int>{3, 6}) {
      for (const Scheme scheme : {Scheme::ring, Scheme::all_gather, Scheme::hybrid}) {
        for (const SequenceLayout& layout : layouts(c, c.seq_q, ranks)) {
          SCOPED_TRACE(::testing::Message() << c.name << ", seed " << seed << ", " << ranks
                                            << " ranks, " << name(scheme));
          auto request = request_of(c, scheme, layout, layout);
          request->node_ranks = ranks % 2 == 0 ? 2 : 1;
          run_on_threads(c, request, found);
          expect_equal(c, found, expected);
        }
      }
    }
  }
}

double root_mean_square_error(const HostTensor& found, const HostTensor& expected) {
  double sum = 0.0;
  for (std::size_t i = 0; i < expected.data.size(); ++i) {
    const double error = static_cast<double>(found.data[i]) - expected.data[i];
    sum += error * error;
  }
  return std::sqrt(sum / static_cast<double>(expected.data.size()));
}

// Partials that travel and are merged stay in f32: 64 of them cost little beside what one rank
// rounds.
TEST(Schemes, SixtyFourRanksErrAtMostHalfAsMuchAgainAsOne) {
  for (const AttentionCase& c :
       {make_case("causal", causal_mask(), 4096), make_case("full", {}, 2048)}) {
    const std::uint64_t seed = fresh_random_seed();
    AttentionTensors expected = random_tensors(c, seed);
    run_reference(c, expected);
    const auto error = [&](Scheme scheme, int ranks) {
      AttentionTensors found = random_tensors(c, seed);
      const SequenceLayout layout = SequenceLayout::zigzag(c.seq_q, ranks);
      auto request = request_of(c, scheme, layout, layout);
      request->node_ranks = std::min(ranks, 4);
      run_on_threads(c, request, found);
      return std::array{root_mean_square_error(found.o, expected.o),
                        root_mean_square_error(found.lse, expected.lse),
                        root_mean_square_error(found.grad_q, expected.grad_q),
                        root_mean_square_error(found.grad_k, expected.grad_k),
                        root_mean_square_error(found.grad_v, expected.grad_v)};
    };
    const auto one = error(Scheme::ring, 1);
    for (const Scheme scheme : {Scheme::ring, Scheme::all_gather, Scheme::hybrid}) {
      const auto many = error(scheme, 64);
      for (std::size_t i = 0; i < one.size(); ++i) {
        EXPECT_LE(many[i], 1.5 * one[i]) << c.name << ", seed " << seed << ", " << name(scheme)
                                         << ", result " << i << " of O, LSE, dQ, dK, dV";
      }
    }
  }
}

TEST(Schemes, GiveTheSameBitsForAnyNumberOfRanksOnRequest) {
  std::vector<AttentionCase> cases = mask_cases();
  for (const AttentionCase& c : feature_cases()) cases.push_back(c);
  cases.push_back(make_case("long", causal_mask(), 700));
  cases.push_back(make_case("long window", window_mask(150, 20), 701));
  const std::uint64_t seed = fresh_random_seed();
  std::size_t number = seed % 6;
  for (const AttentionCase& c : cases) {
    AttentionTensors expected = random_tensors(c, seed);
    AttentionTensors found = expected;
    run_reference(c, expected);
    AttentionTensors first;
    for (const int ranks : {1, 2, 3, 4, 5, 7, 8}) {
      for (const SequenceLayout& layout : layouts(c, c.seq_q, ranks)) {
        for (const Choice& choice : choices(ranks)) {
          const bool ran = !first.o.data.empty();
          if (ran && number++ % 6 != 0) continue;
          SCOPED_TRACE(::testing::Message() << c.name << ", seed " << seed << ", " << ranks
                                            << " ranks, " << name(choice.scheme));
          const auto kv = c.seq_q == c.seq_kv ? layout : SequenceLayout::zigzag(c.seq_kv, ranks);
          auto request = request_of(c, choice.scheme, layout, kv);
          request->node_ranks = choice.node_ranks;
          request->block_rows = c.seq_kv > 300 ? reproducible_block_rows(c.seq_kv) : 16;
          RunOptions options;
          options.execute.in_place = number % 2 == 0;
          ASSERT_NO_THROW(run_on_threads(c, request, found, options));
          if (!ran) {
            first = found;
            expect_equal(c, found, expected);
          }
          ASSERT_TRUE(same_bits(found.o, first.o));
          ASSERT_TRUE(same_bits(found.lse, first.lse));
        }
      }
    }
  }
}

// The layouts of a case where no rank has a part of a block of queries.
std::vector<SequenceLayout> aligned_layouts(const AttentionCase& c, int ranks, std::int64_t block) {
  std::vector<SequenceLayout> all;
  for (const SequenceLayout& layout : layouts(c, c.seq_q, ranks)) {
    all.push_back(layout.aligned(block));
  }
  return all;
}

TEST(Schemes, GiveTheSameBitsOfGradientsForAnyNumberOfRanksOnRequest) {
  std::vector<AttentionCase> cases = mask_cases();
  for (const AttentionCase& c : feature_cases()) cases.push_back(c);
  cases.push_back(make_case("long", causal_mask(), 700));
  cases.push_back(make_case("long window", window_mask(150, 20), 701));
  const bool all = std::getenv("ANNULUS_FULL_MATRIX") != nullptr;
  const std::uint64_t seed = fresh_random_seed();
  const std::size_t stride = all ? 1 : 11;
  std::size_t number = seed % stride;
  for (const AttentionCase& c : cases) {
    const std::int64_t block = c.seq_q > 300 ? reproducible_query_rows(c.seq_q) : 4;
    AttentionTensors expected = random_tensors(c, seed);
    AttentionTensors found = expected;
    run_reference(c, expected);
    AttentionTensors first;
    for (const int ranks : {1, 2, 3, 4, 5, 7, 8}) {
      const std::vector<SequenceLayout> q_layouts = aligned_layouts(c, ranks, block);
      const std::vector<SequenceLayout> kv_layouts = layouts(c, c.seq_kv, ranks);
      for (std::size_t i = 0; i < q_layouts.size(); ++i) {
        for (const Choice& choice : choices(ranks)) {
          const bool ran = !first.o.data.empty();
          if (ran && number++ % stride != 0) continue;
          SCOPED_TRACE(::testing::Message()
                       << c.name << ", seed " << seed << ", " << ranks << " ranks, layout " << i
                       << ", " << name(choice.scheme) << " " << choice.node_ranks);
          auto request =
              request_of(c, choice.scheme, q_layouts[i], kv_layouts[i % kv_layouts.size()]);
          request->node_ranks = choice.node_ranks;
          request->block_rows = c.seq_kv > 300 ? reproducible_block_rows(c.seq_kv) : 16;
          request->q_block_rows = block;
          RunOptions options;
          options.execute.in_place = number % 2 == 0;
          ASSERT_NO_THROW(run_on_threads(c, request, found, options));
          if (!ran) first = found;
          expect_equal(c, found, expected);
          ASSERT_TRUE(same_bits(found.grad_q, first.grad_q)) << "dQ";
          ASSERT_TRUE(same_bits(found.grad_k, first.grad_k)) << "dK";
          ASSERT_TRUE(same_bits(found.grad_v, first.grad_v)) << "dV";
          // One bias of all heads is summed over them where they are.
          if (c.bias_heads == 1 && choice.scheme != Scheme::ring) continue;
          ASSERT_TRUE(same_bits(found.grad_bias, first.grad_bias)) << "dBias";
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(Schemes, KeepTheirBitsUnderDelays) {
  const AttentionCase c = make_case("causal", causal_mask(), 97, 2);
  const std::uint64_t seed = fresh_random_seed();
  for (const Scheme scheme : {Scheme::ring, Scheme::all_gather, Scheme::ulysses, Scheme::hybrid}) {
    const SequenceLayout layout = SequenceLayout::zigzag(97, 4);
    auto request = request_of(c, scheme, layout, layout);
    request->node_ranks = 2;
    AttentionTensors first = random_tensors(c, seed);
    RunOptions prompt;
    prompt.execute.in_place = false;
    run_on_threads(c, request, first, prompt);
    for (std::uint64_t run = 1; run <= 5; ++run) {
      AttentionTensors found = random_tensors(c, seed);
      RunOptions options;
      options.delay_seed = seed + run;
      options.execute.in_place = false;
      run_on_threads(c, request, found, options);
      EXPECT_TRUE(same_bits(found.grad_k, first.grad_k)) << name(scheme);
      EXPECT_TRUE(same_bits(found.grad_q, first.grad_q)) << name(scheme);
      EXPECT_TRUE(same_bits(found.o, first.o)) << name(scheme);
    }
  }
}

TEST(Schemes, HoldTwoRemoteChunksWhateverTheNumberOfRanks) {
  const AttentionCase c = make_case("full", {}, 240);
  for (const int ranks : {3, 4, 6, 8}) {
    const SequenceLayout layout = SequenceLayout::contiguous(240, ranks);
    const auto request = request_of(c, Scheme::ring, layout, layout);
    AttentionTensors tensors = random_tensors(c, 5);
    run_ranks(ranks, [&](Communicator& communicator) {
      ExecutionReport report;
      RunOptions options;
      options.backward = false;
      options.execute.in_place = false;
      options.execute.report = &report;
      run_rank(communicator, c, request, tensors, options);
      const std::int64_t chunk = 240 / ranks * c.kv_heads * (c.head_dim + c.value_dim) * 4;
      const std::int64_t state = 240 / ranks * c.q_heads * (c.value_dim + 2) * 4;
      EXPECT_LE(report.buffer_bytes, 2 * chunk + state + 256);
    });
  }
}

}  // namespace
}  // namespace annulus
