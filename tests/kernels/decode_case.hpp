#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/decode_attention.hpp"
#include "kernels/random_attention.hpp"

namespace annulus::testing {

struct DecodeSequence {
  std::int64_t rows = 1;    // of queries, the last of `length` tokens
  std::int64_t length = 1;  // of the cache
  std::int64_t start = 0;
};

/// What a test asks of decode attention.
struct DecodeOptions {
  DType dtype = DType::f32;
  std::vector<DecodeSequence> sequences;
  std::int64_t q_heads = 4;
  std::int64_t kv_heads = 2;
  std::int64_t head_dim = 64;
  std::int64_t value_dim = 64;
  bool latent = false;  // values are the first columns of the keys
  bool causal = true;
  std::int64_t window_left = -1;
  std::int64_t window_right = -1;
  float soft_cap = 0.0F;
  float spread = 1.0F;  // of the scores
  bool sinks = false;

  std::int64_t longest() const;
  std::int64_t tokens() const;
  std::string to_string() const;
};

/// A rank's paged copy of a case's keys and values: pages in a random order among others that are
/// free, and everything that holds no token of the rank is NaN.
struct PagedCache {
  HostTensor k, v;  // [pages, page_size, kv_heads, dim]; v is absent where values lie in k
  std::vector<std::int32_t> page_table, lengths, starts, query_begin;
  std::int64_t max_pages = 1;

  /// The case's problem over this copy. Points into it and into the case.
  DecodeProblem problem(const struct DecodeCase& of, const CacheDeal& deal) const;
};

/// Queries, keys and values of ragged sequences with random values, and what attention over them
/// is: by the double reference over whole, dense keys, and as plain attention in the dtype gives
/// it, whose error sets the tolerance.
struct DecodeCase {
  DecodeOptions options;
  HostTensor q;                        // [tokens, q_heads, head_dim]
  HostTensor k, v;                     // [sequences, longest, kv_heads, dim]
  HostTensor sinks;                    // [q_heads]
  std::vector<double> o, log_sum_exp;  // [tokens, q_heads, value_dim], [q_heads, tokens]
  std::vector<double> plain_o, plain_log_sum_exp;  // the same

  DecodeCase(DecodeOptions options_, std::uint64_t seed);
  DecodeCase(const DecodeCase&) = delete;
  DecodeCase& operator=(const DecodeCase&) = delete;

  PagedCache paged(const CacheDeal& deal, std::int64_t page_size, std::uint64_t seed) const;
  /// Expects results to be as close to the reference as the acceptance rule asks.
  void expect(const std::vector<double>& o_, const std::vector<double>& log_sum_exp_) const;

 private:
  void attend();
};

/// Calls decode_forward with poisoned outputs, expects the result, and that nothing beside the
/// outputs was written.
void expect_decode(const DecodeCase& expected, const DecodeProblem& problem,
                   std::string_view backend);

}  // namespace annulus::testing
