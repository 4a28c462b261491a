#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sharding/attention_case.hpp"

namespace annulus::testing {

AttentionMask causal_mask();
AttentionMask window_mask(std::int64_t left, std::int64_t right);
AttentionMask document_mask(const std::vector<std::int64_t>& offsets, std::int64_t seq,
                            bool causal = true);

/// Eight query heads over four KV heads.
AttentionCase make_case(std::string name, AttentionMask mask, std::int64_t seq,
                        std::int64_t batch = 1);

/// One case for every kind of mask, and for every feature besides masks.
std::vector<AttentionCase> mask_cases();
std::vector<AttentionCase> feature_cases();

/// Odd lengths, documents that end beside rank boundaries, one longer than all others together;
/// `all`: those that take a while too.
std::vector<AttentionCase> length_cases(bool all);

/// A way to run a case on some ranks.
struct Choice {
  Scheme scheme;
  int node_ranks;
};
std::vector<Choice> choices(int ranks);

/// Contiguous, zigzag and, where queries and keys have one length, balanced.
std::vector<SequenceLayout> layouts(const AttentionCase& c, std::int64_t seq, int ranks);

/// Fresh inputs each run; the seed is printed where a comparison fails.
std::uint64_t fresh_random_seed();

}  // namespace annulus::testing
