#include "kernels/decode_attention.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/decode_case.hpp"
#include "kernels/error.hpp"

namespace annulus::testing {
namespace {

TEST(CacheDeal, CountsAndPlacesEveryTokenOnce) {
  for (const std::int64_t block : {1, 3, 16}) {
    for (const std::int64_t ranks : {1, 2, 3, 5}) {
      std::vector<std::int64_t> next(static_cast<std::size_t>(ranks), 0);
      for (std::int64_t position = 0; position < 200; ++position) {
        for (std::int64_t rank = 0; rank < ranks; ++rank) {
          const CacheDeal deal{block, ranks, rank};
          std::int64_t& local = next[static_cast<std::size_t>(rank)];
          ASSERT_EQ(deal.tokens(position), local);
          if (deal.holds(position)) {
            ASSERT_EQ(deal.position(local++), position);
          }
        }
      }
      for (const std::int64_t count : next) EXPECT_LE(std::abs(count - 200 / ranks), block);
    }
  }
}

std::vector<DecodeOptions> shapes() {
  std::vector<DecodeOptions> all;
  DecodeOptions mixed;
  mixed.sequences = {{1, 37}, {5, 5}, {0, 9}, {3, 40, 4}, {7, 9, 6}};
  all.push_back(mixed);
  mixed.window_left = 6;
  mixed.soft_cap = 5.0F;
  all.push_back(mixed);
  mixed.causal = false;
  mixed.window_right = 2;
  mixed.sinks = true;
  all.push_back(mixed);
  DecodeOptions latent = all.front();
  latent.kv_heads = 1;
  latent.head_dim = 24;
  latent.value_dim = 16;
  latent.latent = true;
  all.push_back(latent);
  return all;
}

TEST(DecodeReference, EqualsAttentionOverPagesAndDeals) {
  for (const DecodeOptions& options : shapes()) {
    const DecodeCase expected(options, test_seed());
    for (const std::int64_t page_size : {1, 4, 64}) {
      SCOPED_TRACE(fmt::format("{}, pages of {}", options.to_string(), page_size));
      const PagedCache cache = expected.paged({}, page_size, test_seed());
      expect_decode(expected, cache.problem(expected, {}), "reference");
    }
  }
}

TEST(DecodeAttention, RefusesWhatDoesNotFit) {
  DecodeOptions options;
  options.sequences = {{1, 10}, {2, 20}};
  const DecodeCase of(options, test_seed());
  PagedCache cache = of.paged({}, 4, test_seed());
  const DecodeProblem good = cache.problem(of, {});
  EXPECT_NO_THROW(validate(good));
  const auto message = [](const DecodeProblem& problem) {
    try {
      validate(problem);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  cache.page_table[static_cast<std::size_t>(cache.max_pages)] = 99;
  EXPECT_EQ(message(good),
            fmt::format("decode: page 0 of sequence 1 is 99; there are {}", good.k.shape[0]));
  DecodeProblem windowed = good;
  windowed.window_left = 3;  // page 0 is behind the window: nobody looks at it
  EXPECT_EQ(message(windowed), "");
  cache.lengths[0] = 0;
  EXPECT_EQ(message(windowed),
            "decode: sequence 0 has 1 query rows and length 0; accepted: 0 to length");
  cache.lengths[0] = 999;
  EXPECT_NE(message(windowed).find("sequence 0 has 999 tokens here, more than"), std::string::npos);
  DecodeProblem heads = good;
  heads.q = heads.q.slice(1, {0, 3});
  EXPECT_NE(message(heads).find("3 query heads do not group over 2 KV heads"), std::string::npos);
}

}  // namespace
}  // namespace annulus::testing
