#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/decode_case.hpp"
#include "runtime/context.hpp"
#include "runtime/key_value_cache.hpp"
#include "runtime/operation_registry.hpp"

namespace annulus::testing {

/// A mesh to try decode operations on, and where the caller's tensors lie.
struct DecodePlace {
  std::string mesh;            // "sp=2,tp=2"
  bool split_queries = false;  // heads along tp and sp, or whole on every rank
  std::int64_t page_size = 4;
  std::int64_t block = 0;
  std::string backend = "cpu";  // with cuda the tensors and the cache lie on the device
  Transport transport = Transport::automatic;
};

/// The meshes of so many ranks.
std::vector<DecodePlace> decode_places(int ranks);

OperationMetadata decode_metadata(Context& context, const DecodePlace& place, DType dtype);

/// A cache for a case, with `spare` pages more on every rank than its tokens need.
std::shared_ptr<KeyValueCache> cache_for(const OperationMetadata& metadata,
                                         const DecodePlace& place, const DecodeCase& of,
                                         std::int64_t spare);

/// Runs `operation` over all tokens of a case whose sequences have as many rows as tokens, some
/// rows of each sequence at a time (chunks of prefill, then single tokens), and expects what one
/// forward over everything gives. Every rank checks. Collective.
void expect_chunks(Context& context, const std::string& operation, const DecodePlace& place,
                   const DecodeCase& expected, std::uint64_t seed);

/// autoregressive_decodeattn over keys and values as tensors.
void expect_autoregressive(Context& context, const DecodePlace& place, const DecodeCase& expected);

/// paged_flash_attention, with one number of rows for all sequences.
void expect_paged_flash(Context& context, const DecodePlace& place, const DecodeCase& expected);

}  // namespace annulus::testing
