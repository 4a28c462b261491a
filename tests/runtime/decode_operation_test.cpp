#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/error.hpp"
#include "sharding/thread_communicator.hpp"
#include "tests/runtime/decode_checks.hpp"

namespace annulus::testing {
namespace {

DecodeOptions whole_sequences() {
  DecodeOptions options;
  options.sequences = {{13, 13}, {40, 40}, {1, 1}, {27, 27}, {9, 9}};
  options.q_heads = 8;
  options.kv_heads = 4;
  options.head_dim = 32;
  options.value_dim = 24;
  return options;
}

void on_ranks(int ranks, const std::function<void(Context&)>& body) {
  run_ranks(ranks, [&](Communicator& communicator) {
    Context context(communicator);
    body(context);
  });
}

class DecodeOperations : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, DecodeOperations, ::testing::Values(1, 2, 3, 4));

TEST_P(DecodeOperations, ChunksOfPrefillThenDecodeEqualOneForward) {
  for (const char* operation :
       {"ragged_page_attention_v2", "ragged_page_attention_v3", "unified_attention"}) {
    DecodeOptions options = whole_sequences();
    if (operation[0] == 'u') options.dtype = DType::bf16;
    if (operation[22] == '2') options.window_left = 11;
    if (operation[22] == '3') options.sinks = true;
    const DecodeCase expected(options, test_seed());
    for (const DecodePlace& place : decode_places(GetParam())) {
      SCOPED_TRACE(fmt::format("{} {}", operation, place.mesh));
      on_ranks(GetParam(), [&](Context& context) {
        expect_chunks(context, operation, place, expected, test_seed());
      });
    }
  }
}

TEST_P(DecodeOperations, LatentChunksEqualOneForward) {
  DecodeOptions options = whole_sequences();
  options.dtype = DType::bf16;
  options.kv_heads = 1;
  options.head_dim = 576;
  options.value_dim = 512;
  options.latent = true;
  options.soft_cap = 20.0F;
  const DecodeCase expected(options, test_seed());
  for (const char* version : {"v1", "v2"}) {
    for (const DecodePlace& place : decode_places(GetParam())) {
      SCOPED_TRACE(fmt::format("{} {}", version, place.mesh));
      on_ranks(GetParam(), [&](Context& context) {
        expect_chunks(context, fmt::format("multi_latent_ragged_page_attention_{}", version), place,
                      expected, test_seed());
      });
    }
  }
}

TEST_P(DecodeOperations, AutoregressiveDecodeReadsTensors) {
  DecodeOptions options;
  options.sequences = {{1, 70}, {1, 33, 5}, {1, 1}, {1, 64, 63}};
  options.q_heads = 8;
  options.kv_heads = 2;
  options.causal = false;
  const DecodeCase expected(options, test_seed());
  // Tokens that do not count may hold anything finite: they are the caller's.
  for (const DecodePlace& place : decode_places(GetParam())) {
    SCOPED_TRACE(place.mesh);
    on_ranks(GetParam(),
             [&](Context& context) { expect_autoregressive(context, place, expected); });
  }
}

TEST_P(DecodeOperations, PagedFlashTakesBatches) {
  for (const bool causal : {false, true}) {
    DecodeOptions options;
    options.sequences = {{6, 50}, {6, 9}, {6, 21}, {6, 6}};
    options.q_heads = 8;
    options.kv_heads = 4;
    options.causal = causal;
    const DecodeCase expected(options, test_seed());
    for (const DecodePlace& place : decode_places(GetParam())) {
      SCOPED_TRACE(place.mesh);
      on_ranks(GetParam(), [&](Context& context) { expect_paged_flash(context, place, expected); });
    }
  }
}

TEST(DecodeOperation, RunsOutOfPagesOnAllRanksAndChangesNothing) {
  DecodeOptions options = whole_sequences();
  const DecodeCase of(options, test_seed());
  const DecodePlace place{.mesh = "sp=2"};
  on_ranks(2, [&](Context& context) {
    const OperationMetadata metadata = decode_metadata(context, place, DType::f32);
    KeyValueCacheOptions small{.sequences = 2,
                               .kv_heads = 4,
                               .head_dim = 32,
                               .value_dim = 24,
                               .dtype = DType::f32,
                               .page_size = 4,
                               .pages = 3};
    const auto cache = std::make_shared<KeyValueCache>(metadata, small);
    const auto attend = OperationRegistry::create("ragged_page_attention_v3", metadata);
    const auto tensor = [&](const Shape& shape) {
      return DistributedTensor::filled(
          DType::f32, TensorLayout(shape, NamedSharding(metadata.mesh, PartitionSpec())),
          context.rank(), [](std::span<const std::int64_t>) { return 0.5; });
    };
    const auto call = [&](std::int64_t first, std::int64_t second) {
      const std::int64_t tokens = first + second;
      const DistributedTensor q = tensor(Shape{tokens, 8, 32});
      const DistributedTensor k = tensor(Shape{tokens, 4, 32});
      const DistributedTensor v = tensor(Shape{tokens, 4, 24});
      const std::vector<std::int64_t> begin{0, first, tokens};
      AttentionInputs inputs{.query = q, .key = k, .value = v};
      inputs.decode.cache = cache;
      inputs.decode.query_begin = begin;
      AttentionOptions thd;
      thd.order = DimOrder::thd;
      static_cast<void>((*attend)(inputs, thd));
    };
    call(16, 4);  // pages: 2 + 1 of rank 0, 2 of rank 1
    try {
      call(1, 5);
      ADD_FAILURE() << "there are no pages left";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::no_memory);
      EXPECT_NE(
          std::string(error.what())
              .find("ragged_page_attention_v3: cache: sequence 0 needs 1 more pages of 4 "
                    "tokens on rank 0 of batch part 0 for 1 tokens after 16; 0 of 3 are free"),
          std::string::npos)
          << error.what();
    }
    EXPECT_EQ(cache->lengths()[0], 16);
    EXPECT_EQ(cache->lengths()[1], 4);
    cache->free(0);
    call(1, 5);
    EXPECT_EQ(cache->lengths()[1], 9);
  });
}

TEST(DecodeOperation, RefusesWhatItCannotServe) {
  const DecodePlace place{.mesh = "sp=1"};
  on_ranks(1, [&](Context& context) {
    const OperationMetadata metadata = decode_metadata(context, place, DType::f32);
    const auto tensor = [&](const Shape& shape) {
      return DistributedTensor::filled(
          DType::f32, TensorLayout(shape, NamedSharding(metadata.mesh, PartitionSpec())),
          context.rank(), [](std::span<const std::int64_t>) { return 0.5; });
    };
    const DistributedTensor q = tensor(Shape{2, 3, 4, 16});
    const DistributedTensor k = tensor(Shape{2, 9, 4, 16});
    const auto message = [&](const char* operation) {
      try {
        static_cast<void>((*OperationRegistry::create(operation, metadata))(
            AttentionInputs{.query = q, .key = k, .value = k}));
      } catch (const Error& error) {
        return std::string(error.what());
      }
      return std::string();
    };
    EXPECT_NE(message("ragged_page_attention_v2").find("needs a cache of pages"),
              std::string::npos);
    EXPECT_NE(message("autoregressive_decodeattn")
                  .find("takes one query token of each sequence, "
                        "not 3"),
              std::string::npos);
  });
}

TEST(KeyValueCache, RefusesHeadsThatDoNotDivide) {
  EXPECT_EQ(cache_heads(4, 2)[1].front(), (Span{2, 4}));
  EXPECT_EQ(cache_heads(2, 4)[3].front(), (Span{1, 2}));
  EXPECT_THROW(static_cast<void>(cache_heads(4, 3)), Error);
}

}  // namespace
}  // namespace annulus::testing
