#include "sharding/decode_checks.hpp"

#include <gtest/gtest.h>

#include "sharding/decode_merge.hpp"
#include "sharding/named_sharding.hpp"

namespace annulus::testing {
namespace {

// A state full of poison: [1, tokens, heads, dim].
struct State {
  HostTensor accumulator, row_max, row_sum;

  State(std::int64_t tokens, std::int64_t heads, std::int64_t dim)
      : accumulator(DType::f32, Shape{1, tokens, heads, dim}, {0, 1, 2, 3}, 0),
        row_max(DType::f32, Shape{1, heads, tokens}, {0, 1, 2}, 0),
        row_sum(DType::f32, Shape{1, heads, tokens}, {0, 1, 2}, 0) {}
  AttentionState view() { return {accumulator.view(), row_max.view(), row_sum.view()}; }
};

// Expects what a rank holds of O [tokens, heads, dim] and LSE [heads, tokens].
void expect_heads(const DecodeCase& expected, const HostTensor& o, const HostTensor& lse,
                  Span heads) {
  const DecodeOptions& options = expected.options;
  std::vector<double> all_o = expected.o;
  std::vector<double> all_lse = expected.log_sum_exp;
  const std::vector<double> own_o = o.values();
  const std::vector<double> own_lse = lse.values();
  for (std::int64_t token = 0; token < options.tokens(); ++token) {
    for (std::int64_t head = heads.begin; head < heads.end; ++head) {
      const auto whole =
          static_cast<std::ptrdiff_t>((token * options.q_heads + head) * options.value_dim);
      const auto own = static_cast<std::ptrdiff_t>((token * heads.size() + head - heads.begin) *
                                                   options.value_dim);
      std::copy_n(own_o.begin() + own, options.value_dim, all_o.begin() + whole);
      all_lse[static_cast<std::size_t>(head * options.tokens() + token)] =
          own_lse[static_cast<std::size_t>((head - heads.begin) * options.tokens() + token)];
    }
  }
  expected.expect(all_o, all_lse);
}

}  // namespace

void expect_dealt_decode(Communicator& ranks, const DecodeCase& expected, std::int64_t block,
                         std::int64_t page_size) {
  const DecodeOptions& options = expected.options;
  const CacheDeal deal{block, ranks.size(), ranks.rank()};
  const PagedCache cache = expected.paged(deal, page_size, test_seed() + 7);
  DecodeProblem problem = cache.problem(expected, deal);
  if (ranks.rank() != 0) problem.sinks = {};
  State state(options.tokens(), options.q_heads, options.value_dim);
  decode_forward({problem, state.view(), {}, {}, {}});

  const MergeShape shape{options.tokens(), options.q_heads, options.value_dim, options.dtype, true};
  for (const MergedHeads wanted : {MergedHeads::everywhere, MergedHeads::split}) {
    const Span heads = wanted == MergedHeads::everywhere
                           ? Span{0, options.q_heads}
                           : split_evenly(options.q_heads, ranks.size(), ranks.rank());
    HostTensor o(options.dtype, Shape{options.tokens(), heads.size(), options.value_dim}, {0, 1, 2},
                 0);
    HostTensor lse(DType::f32, Shape{heads.size(), options.tokens()}, {1, 0}, 2);
    const std::int64_t before = ranks.bytes_sent();
    merge_over_ranks(ranks, state.view(), o.view(), lse.view(), wanted);
    EXPECT_EQ(ranks.bytes_sent() - before, merge_bytes(shape, ranks.size(), ranks.rank(), wanted));
    expect_heads(expected, o, lse, heads);
  }
}

}  // namespace annulus::testing
