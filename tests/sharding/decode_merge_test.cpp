#include "sharding/decode_merge.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/decode_case.hpp"
#include "kernels/error.hpp"
#include "sharding/decode_checks.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

// Queries and keys that other projects check their decode kernels with, over 1 to 4 ranks.
TEST(DecodeMerge, EqualsTheReferenceOverAnyRanks) {
  constexpr DecodeSequence kShapes[] = {{1, 128}, {1, 339},   {3, 1024},  {64, 800},
                                        {3, 799}, {64, 2048}, {16, 20000}};
  for (const DecodeSequence& shape : kShapes) {
    DecodeOptions options;
    options.dtype = shape.length % 2 == 0 ? DType::bf16 : DType::f32;
    options.sequences = {shape, {1, 5}, {shape.rows, shape.length, shape.length / 2}};
    options.q_heads = 6;
    options.sinks = shape.rows == 3;
    const DecodeCase expected(options, test_seed());
    for (const std::int64_t page_size : {1, 4, 16, 128}) {
      for (int ranks = 1; ranks <= 4; ++ranks) {
        SCOPED_TRACE(
            fmt::format("{}, pages of {}, {} ranks", options.to_string(), page_size, ranks));
        run_ranks(ranks, [&](Communicator& communicator) {
          expect_dealt_decode(communicator, expected, page_size, page_size);
        });
      }
    }
  }
}

TEST(DecodeMerge, EqualsTheReferenceForBlocksOfAnyLength) {
  DecodeOptions options;
  options.sequences = {{1, 50}, {4, 4}, {2, 33, 9}, {0, 20}};
  options.q_heads = 3;
  options.kv_heads = 1;
  options.window_left = 12;
  const DecodeCase expected(options, test_seed());
  for (const std::int64_t block : {1, 3, 8, 100}) {
    for (int ranks = 1; ranks <= 5; ++ranks) {
      SCOPED_TRACE(fmt::format("blocks of {}, {} ranks", block, ranks));
      run_ranks(ranks,
                [&](Communicator& communicator) {
                  expect_dealt_decode(communicator, expected, block, 4);
                },
                {.delay_seed = test_seed()});
    }
  }
}

}  // namespace
}  // namespace annulus::testing
