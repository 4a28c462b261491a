// What a program may pass by mistake: all ranks refuse it alike, before anything is exchanged.

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "runtime/key_value_cache.hpp"
#include "runtime/operation_registry.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

constexpr const char* kRows = "((fsdp,dp), sp, tp, -)";
constexpr const char* kHeadRows = "((fsdp,dp), tp, sp)";

/// One rank of two along the sequence, and tensors on it.
class Rank {
 public:
  explicit Rank(Communicator& ranks)
      : context_(ranks),
        mesh_(Mesh::parse("sp=-1", context_.size())),
        metadata_(resolve_metadata(context_, {.backend = "cpu", .mesh = mesh_})) {}

  int rank() const { return context_.rank(); }
  const OperationMetadata& metadata() const { return metadata_; }

  DistributedTensor tensor(const Shape& shape, DType dtype = DType::f32) const {
    return over(mesh_, shape, dtype);
  }
  DistributedTensor over(const Mesh& mesh, const Shape& shape, DType dtype = DType::f32) const {
    const PartitionSpec spec = PartitionSpec::parse(shape.rank() == 3 ? kHeadRows : kRows);
    return DistributedTensor::filled(dtype, TensorLayout(shape, NamedSharding(mesh, spec)), rank(),
                                     [](std::span<const std::int64_t>) { return 1.0; });
  }

  /// What `call` throws, "" when nothing.
  static std::string refusal(const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

 private:
  Context context_;
  Mesh mesh_;
  OperationMetadata metadata_;
};

void on_two_ranks(const std::function<void(const Rank&)>& body) {
  run_ranks(2, [&](Communicator& ranks) { body(Rank(ranks)); });
}

void expect_within(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos)
      << "'" << text << "' says nothing of '" << part << "'";
}

/// A decode call over a cache of two sequences of three tokens.
class DecodeCall {
 public:
  explicit DecodeCall(const Rank& on) : on_(on) {}

  std::string refusal(const AttentionOptions& options = {}) const {
    const DistributedTensor q = on_.tensor({2, 1, 4, 16});
    const DistributedTensor k = on_.tensor({2, 1, 2, 16});
    return Rank::refusal([&] {
      AttentionInputs inputs{.query = q, .key = k, .value = k};
      inputs.decode.cache = std::make_shared<KeyValueCache>(on_.metadata(), cache);
      inputs.decode.cache->append(std::vector<std::int64_t>{3, 3});
      static_cast<void>(
          (*OperationRegistry::create("unified_attention", on_.metadata()))(inputs, options));
    });
  }

  KeyValueCacheOptions cache{.sequences = 2,
                             .kv_heads = 2,
                             .head_dim = 16,
                             .value_dim = 16,
                             .dtype = DType::f32,
                             .page_size = 4,
                             .pages = 8};

 private:
  const Rank& on_;
};

TEST(Refusal, TensorsOfOtherTypes) {
  on_two_ranks([](const Rank& on) {
    const DistributedTensor q = on.tensor({1, 10, 4, 16});
    const DistributedTensor k = on.tensor({1, 10, 2, 16});
    const DistributedTensor flags = on.tensor({1, 10, 2, 16}, DType::u8);
    const DistributedTensor pairs = on.tensor({1, 1, 10, 10});
    const DistributedTensor whole = on.tensor({1, 1, 10, 10}, DType::i32);
    for (const char* operation : {"vanilla", "flash", "ring", "ulysses", "auto"}) {
      const auto attend = OperationRegistry::create(operation, on.metadata());
      const auto refusal = [&](const AttentionInputs& inputs) {
        return Rank::refusal([&] { static_cast<void>((*attend)(inputs)); });
      };
      EXPECT_EQ(refusal({.query = q, .key = k, .value = k}), "");
      expect_within(refusal({.query = q, .key = flags, .value = k}),
                    attend->name() + ": attention: key is of u8; accepted: f32, f16");
      expect_within(refusal({.query = q, .key = k, .value = flags}), "value is of u8");
      expect_within(refusal({.query = q, .key = k, .value = k, .mask = &pairs}),
                    "mask is of f32; accepted: u8, 1 keeps");
      expect_within(refusal({.query = q, .key = k, .value = k, .bias = &whole}), "bias is of i32");
    }
  });
}

TEST(Refusal, OutputsThatAreNoFloats) {
  on_two_ranks([](const Rank& on) {
    const DistributedTensor q = on.tensor({1, 10, 4, 16});
    for (const DType dtype : {DType::u8, DType::i64, DType::f64}) {
      AttentionOptions options;
      options.output_dtype = dtype;
      const std::string wanted =
          fmt::format("output dtype {}; accepted: f32, f16, bf16", name(dtype));
      const auto attend = OperationRegistry::create("ring", on.metadata());
      expect_within(Rank::refusal([&] {
                      static_cast<void>((*attend)({q, q, q}, options));
                    }),
                    wanted);
      expect_within(DecodeCall(on).refusal(options), wanted);
    }
  });
}

TEST(Refusal, MetadataWithoutAContext) {
  expect_within(
      Rank::refusal([] {
        static_cast<void>(OperationRegistry::create(
            "ring", {.mesh = Mesh::parse("sp=1", 1), .partition_manager = PartitionManager()}));
      }),
      "metadata without a context");
}

TEST(Refusal, RootsThatDifferAmongRanks) {
  run_ranks(2, [](Communicator& ranks) {
    Context context(ranks);
    expect_within(Rank::refusal([&] {
                    static_cast<void>(OperationOutput{}.gather(context, context.rank()));
                  }),
                  "gather: ranks were not started alike: root is rank 0 on rank 0 but rank 1");
  });
}

TEST(Refusal, TensorsOverAnotherMesh) {
  on_two_ranks([](const Rank& on) {
    const DistributedTensor q = on.over(Mesh::parse("tp=2", 2), {1, 10, 4, 16});
    const DistributedTensor k = on.tensor({1, 10, 2, 16});
    const auto attend = OperationRegistry::create("ring", on.metadata());
    expect_within(Rank::refusal([&] {
                    static_cast<void>((*attend)({q, k, k}));
                  }),
                  "query lies over mesh dp=1,fsdp=1,ep=1,tp=2,sp=1, the operation over "
                  "dp=1,fsdp=1,ep=1,tp=1,sp=2");
  });
}

TEST(Refusal, ResultsThatAreNotOfTheForwardCall) {
  on_two_ranks([](const Rank& on) {
    const DistributedTensor q = on.tensor({1, 10, 4, 16});
    const DistributedTensor k = on.tensor({1, 10, 2, 16});
    const DistributedTensor grad = on.tensor({1, 10, 4, 16});
    const auto attend = OperationRegistry::create("ring", on.metadata());
    const OperationOutput output = (*attend)({q, k, k});
    const auto refusal = [&](const OperationOutput& given, const DistributedTensor& grad_output) {
      return Rank::refusal([&] {
        static_cast<void>(attend->backward({q, k, k}, {}, given, grad_output));
      });
    };
    EXPECT_EQ(refusal(output, grad), "");
    expect_within(refusal(output, on.tensor({1, 9, 4, 16})),
                  "ring: grad_output is [1, 9, 4, 16], expected [1, 10, 4, 16]");
    expect_within(refusal(output, on.tensor({1, 10, 4, 16}, DType::u8)), "grad_output is of u8");
    expect_within(refusal(output, {}), "the backward pass needs grad_output");
    expect_within(refusal({}, grad), "the backward pass needs attention_outputs");
    OperationOutput other;
    other.attention_outputs = on.tensor({1, 10, 4, 16});
    other.log_sum_exp = on.tensor({1, 4, 11});
    expect_within(refusal(other, grad), "log_sum_exp is [1, 4, 11], expected [1, 4, 10]");
  });
}

TEST(Refusal, OptionsThatDecodeDoesNotFollow) {
  on_two_ranks([](const Rank& on) {
    const DecodeCall call(on);
    EXPECT_EQ(call.refusal(), "");
    AttentionOptions prefix, segments, blocks, weights, reproducible;
    prefix.mask.prefix_lengths = {1, 1};
    segments.mask.kv_segments = {{{{0, 4}, 0}}};
    blocks.mask.block_q = blocks.mask.block_kv = 16;
    weights.attention_weights = true;
    reproducible.reproducible = true;
    for (const AttentionOptions* options : {&prefix, &segments, &blocks}) {
      expect_within(call.refusal(*options),
                    "unified_attention: takes no segments, no prefixes and no blocks");
    }
    expect_within(call.refusal(weights), "forms no attention_weights");
    expect_within(call.refusal(reproducible), "is not reproducible");
  });
}

TEST(Refusal, CachesThatDifferAmongRanks) {
  on_two_ranks([](const Rank& on) {
    const std::int64_t odd = on.rank();
    DecodeCall page_size(on), block(on), dtype(on);
    page_size.cache.page_size += odd;
    block.cache.block = 4 + odd;
    if (odd != 0) dtype.cache.dtype = DType::bf16;
    for (const DecodeCall* call : {&page_size, &block, &dtype}) {
      const std::string said = call->refusal();
      expect_within(said, "ranks were not started alike: cache is f32");
      expect_within(said, "but ");
    }
    AttentionOptions options;
    options.output_dtype = odd != 0 ? DType::bf16 : DType::f32;
    expect_within(DecodeCall(on).refusal(options),
                  "output dtype is f32 on rank 0 but bf16 on rank 1");
  });
}

TEST(Refusal, CachesOfImpossibleSizes) {
  on_two_ranks([](const Rank& on) {
    const auto refusal = [&](const std::function<void(KeyValueCacheOptions&)>& change) {
      DecodeCall call(on);
      change(call.cache);
      return call.refusal();
    };
    expect_within(refusal([](auto& cache) { cache.pages = std::int64_t{1} << 60; }),
                  "cache: 1152921504606846976 pages; accepted: 1 to 2147483647");
    expect_within(refusal([](auto& cache) { cache.block = -4; }),
                  "cache: 0 contiguous tokens, blocks of -4; accepted: 0 or more");
    expect_within(refusal([](auto& cache) { cache.contiguous_tokens = -16; }),
                  "cache: -16 contiguous tokens");
  });
}

}  // namespace
}  // namespace annulus::testing
