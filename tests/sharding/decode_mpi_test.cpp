// Decode over a cache that lies on several processes.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "runtime/context.hpp"
#include "sharding/decode_checks.hpp"

namespace annulus::testing {
namespace {

TEST(DecodeMpi, EqualsTheReferenceOverProcesses) {
  Context context;
  constexpr DecodeSequence kShapes[] = {{1, 339}, {3, 1024}, {64, 800}, {16, 20000}};
  for (const DecodeSequence& shape : kShapes) {
    DecodeOptions options;
    options.dtype = DType::bf16;
    options.sequences = {shape, {1, 7}};
    options.sinks = true;
    const DecodeCase expected(options, 2024);  // the same on all ranks
    for (const std::int64_t page_size : {1, 16}) {
      SCOPED_TRACE(fmt::format("{}, pages of {}", options.to_string(), page_size));
      expect_dealt_decode(context.world(), expected, page_size, page_size);
    }
  }
}

}  // namespace
}  // namespace annulus::testing
