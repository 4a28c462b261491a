// The operations over a cache, with ranks as processes.

#include <gtest/gtest.h>

#include "tests/runtime/decode_checks.hpp"

namespace annulus::testing {
namespace {

TEST(DecodeOperationsMpi, ChunksEqualOneForward) {
  Context context;
  DecodeOptions options;
  options.sequences = {{13, 13}, {40, 40}, {1, 1}, {27, 27}};
  options.q_heads = 8;
  options.kv_heads = 4;
  options.dtype = DType::bf16;
  const DecodeCase expected(options, 2025);  // the same on all ranks
  for (const DecodePlace& place : decode_places(context.size())) {
    SCOPED_TRACE(place.mesh);
    expect_chunks(context, "ragged_page_attention_v3", place, expected, 7);
    expect_chunks(context, "unified_attention", place, expected, 8);
  }
}

}  // namespace
}  // namespace annulus::testing
