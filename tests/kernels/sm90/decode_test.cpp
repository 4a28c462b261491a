#include <cuda_runtime.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "kernels/cuda_support.hpp"
#include "kernels/decode_case.hpp"
#include "kernels/sm90/decode_device.hpp"

// The Hopper decode kernel against the double reference. Needs a Hopper GPU:
// build/test_kernels --gtest_filter='Sm90Decode*'; ANNULUS_FUZZ sets the number of shapes.
namespace annulus::testing {
namespace {

class Sm90Decode : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no GPU here";
  }
  std::mt19937_64 random_{test_seed()};

  std::int64_t pick(std::initializer_list<std::int64_t> from) {
    return *(from.begin() + random_() % from.size());
  }
};

/// The (queries, keys) that a cache is to be tried with.
TEST_F(Sm90Decode, EqualsTheReferenceForTheListOfShapes) {
  struct Counts {
    std::int64_t queries, keys;
  };
  for (const Counts& counts :
       {Counts{1, 128}, {1, 339}, {3, 1024}, {64, 800}, {3, 799}, {64, 2048}, {16, 20000}}) {
    DecodeOptions options;
    options.dtype = random_() % 2 == 0 ? DType::bf16 : DType::f16;
    options.sequences = {{counts.queries, counts.keys}};
    options.q_heads = counts.keys > 3000 ? 2 : 4;
    options.kv_heads = counts.keys > 3000 ? 1 : 2;
    options.head_dim = options.value_dim = 128;
    const DecodeCase expected(options, random_());
    for (const std::int64_t page_size :
         {std::int64_t{1}, std::int64_t{4}, std::int64_t{16}, std::int64_t{128}, counts.keys}) {
      SCOPED_TRACE(fmt::format("{}, pages of {}", options.to_string(), page_size));
      const PagedCache cache = expected.paged({}, page_size, random_());
      expect_decode_on_device(expected, cache, {});
    }
  }
}

TEST_F(Sm90Decode, EqualsTheReferenceOnRandomBatches) {
  const char* wanted = std::getenv("ANNULUS_FUZZ");
  const int shapes = wanted == nullptr ? 40 : std::atoi(wanted);
  for (int i = 0; i < shapes; ++i) {
    DecodeOptions options;
    options.dtype = random_() % 2 == 0 ? DType::bf16 : DType::f16;
    options.kv_heads = pick({1, 2, 3, 8});
    options.q_heads = options.kv_heads * pick({1, 1, 4, 5, 8});
    options.head_dim = options.value_dim = pick({64, 96, 128, 192, 256});
    for (std::int64_t left = pick({1, 2, 5, 9}); left > 0; --left) {
      DecodeSequence sequence;
      sequence.length = pick({0, 1, 7, 64, 65, 127, 200, 339});
      sequence.rows = std::min(sequence.length, pick({0, 1, 1, 1, 2, 3, 17, 70}));
      sequence.start = random_() % 3 == 0 ? static_cast<std::int64_t>(random_() % 80) : 0;
      sequence.start = std::min(sequence.start, sequence.length);
      options.sequences.push_back(sequence);
    }
    options.causal = random_() % 5 != 0;
    if (random_() % 4 == 0) options.window_left = pick({0, 1, 30, 130});
    if (!options.causal && random_() % 2 == 0) options.window_right = pick({0, 3, 40});
    options.soft_cap = random_() % 5 == 0 ? 8.0F : 0.0F;
    options.sinks = random_() % 4 == 0;
    if (options.tokens() == 0) continue;
    const DecodeCase expected(options, random_());
    const std::int64_t page_size = pick({1, 2, 4, 8, 16, 24, 64, 128, 256, 340});
    const CacheDeal deal{pick({1, 16, 64}), pick({1, 1, 2, 3}), 0};
    SCOPED_TRACE(fmt::format("shape {}: {}, pages of {}, {} ranks in blocks of {}", i,
                             options.to_string(), page_size, deal.ranks, deal.block));
    if (deal.ranks == 1) {
      expect_decode_on_device(expected, expected.paged(deal, page_size, random_()), deal);
    } else {
      expect_merged_decode_on_device(expected, deal, page_size, random_());
    }
    if (HasFatalFailure()) return;
  }
}

TEST_F(Sm90Decode, LatentEqualsTheReference) {
  for (const std::int64_t heads : {16, 64, 128, 128}) {
    DecodeOptions options;
    options.dtype = random_() % 2 == 0 ? DType::bf16 : DType::f16;
    options.sequences = {{1, 300}, {2, pick({64, 129, 500}), 21}, {0, 9}, {1, pick({1, 63, 700})}};
    options.q_heads = heads;
    options.kv_heads = 1;
    options.head_dim = 576;
    options.value_dim = 512;
    options.latent = true;
    if (random_() % 3 == 0) options.window_left = 70;
    options.soft_cap = random_() % 4 == 0 ? 8.0F : 0.0F;
    options.sinks = random_() % 3 == 0;
    const DecodeCase expected(options, random_());
    for (const std::int64_t page_size : {1, 8, 16, 64, 700}) {
      SCOPED_TRACE(fmt::format("{}, pages of {}", options.to_string(), page_size));
      expect_decode_on_device(expected, expected.paged({}, page_size, random_()), {});
    }
    SCOPED_TRACE(options.to_string() + " over 3 ranks");
    expect_merged_decode_on_device(expected, {16, 3, 0}, 16, random_());
    if (HasFailure()) return;
  }
}

TEST_F(Sm90Decode, LatentRepeatsBitForBit) {
  DecodeOptions options;
  options.dtype = DType::bf16;
  options.sequences = {{1, 2000}, {1, 333}, {1, 64}};
  options.q_heads = 128;
  options.kv_heads = 1;
  options.head_dim = 576;
  options.value_dim = 512;
  options.latent = true;
  const DecodeCase of(options, random_());
  DeviceDecode device(of, of.paged({}, 64, random_()), {});
  device.run();
  const std::vector<double> first = device.o_values();
  of.expect(first, device.lse_values());
  for (int i = 0; i < 1000; ++i) {
    device.poison();
    device.run();
    ASSERT_EQ(device.o_values(), first) << "repeat " << i;
  }
}

DecodeOptions small_batch(std::int64_t head_dim) {
  DecodeOptions options;
  options.dtype = DType::bf16;
  options.sequences = {{1, 700}, {1, 0}, {0, 33}, {5, 1300, 17}, {1, 64}};
  options.sequences[1].rows = 0;
  options.q_heads = 8;
  options.head_dim = options.value_dim = head_dim;
  return options;
}

/// Lengths below the number of rows: the first rows stand before the sequence.
TEST_F(Sm90Decode, WritesZerosForRowsWithoutKeys) {
  DecodeOptions options = small_batch(128);
  const DecodeCase of(options, random_());
  PagedCache cache = of.paged({}, 16, random_());
  std::fill(cache.lengths.begin(), cache.lengths.end(), 0);
  DeviceDecode device(of, cache, {});
  device.run();
  for (const double value : device.o_values()) ASSERT_EQ(value, 0.0);
  for (const double value : device.lse_values()) ASSERT_EQ(value, -INFINITY);
}

TEST_F(Sm90Decode, ReadsPagesBeyondTwoToThe31Elements) {
  const DecodeCase of(small_batch(128), random_());
  PagedCache cache = of.paged({}, 16, random_());
  const std::int64_t far = (std::int64_t{1} << 31) / (16 * 2 * 128) + 1000;
  for (std::int32_t& page : cache.page_table) page += static_cast<std::int32_t>(far);
  for (const bool gathered : {false, true}) {
    DeviceDecode device(of, cache, {}, far);
    if (gathered) device.split_pages(4);
    device.run();
    of.expect(device.o_values(), device.lse_values());
  }
}

/// More blocks than the dealing counts in 32 bits.
TEST_F(Sm90Decode, SplitsMillionsOfBlocksOfKeys) {
  constexpr std::int64_t kTimes = 33000;
  DecodeOptions options;
  options.dtype = DType::bf16;
  options.sequences = {{1, 4096}};
  options.q_heads = options.kv_heads = 1;
  options.head_dim = options.value_dim = 128;
  const DecodeCase of(options, random_());
  DeviceDecode device(of, of.paged({}, 4096, random_()), {});
  device.repeat_page(kTimes);
  device.run();
  expect_near(device.o_values(), of.o, 0.02);
  std::vector<double> log_sum_exp = of.log_sum_exp;
  for (double& value : log_sum_exp) value += std::log(static_cast<double>(kTimes));
  expect_near(device.lse_values(), log_sum_exp, 0.002);
}

TEST_F(Sm90Decode, RepeatsBitForBit) {
  for (const std::int64_t page_size : {1, 16, 1300}) {
    const DecodeCase of(small_batch(128), random_());
    const PagedCache cache = of.paged({}, page_size, random_());
    DeviceDecode device(of, cache, {});
    device.run();
    const std::vector<double> first = device.o_values();
    for (int i = 0; i < 1000; ++i) {
      device.poison();
      device.run();
      ASSERT_EQ(device.o_values(), first) << "repeat " << i << ", pages of " << page_size;
    }
  }
}

/// One capture, replayed while the sequences grow.
TEST_F(Sm90Decode, OneGraphServesGrowingLengths) {
  DecodeOptions options = small_batch(64);
  const DecodeCase longest(options, random_());
  PagedCache cache = longest.paged({}, 16, random_());
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  DeviceDecode device(longest, cache, {});
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  device.run({stream});
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  for (const std::int64_t off : {600, 300, 63, 1, 0}) {
    PagedCache shorter = cache;
    for (std::size_t s = 0; s < shorter.lengths.size(); ++s) {
      const auto least = static_cast<std::int32_t>(options.sequences[s].rows);
      shorter.lengths[s] = std::max(least, cache.lengths[s] - static_cast<std::int32_t>(off));
    }
    device.set_lengths(shorter.lengths);
    device.poison();
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    const HostDecode expected = decode_on_host(longest, shorter);
    expect_near(device.o_values(), expected.o, 0.02);
    expect_near(device.lse_values(), expected.log_sum_exp, 0.002);
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(Sm90Decode, AppendsWhatTheHostAppends) {
  for (const CacheDeal& deal : {CacheDeal{}, CacheDeal{16, 3, 1}}) {
    for (const std::int64_t page_size : {1, 16}) {
      const DecodeCase of(small_batch(64), random_());
      PagedCache host = of.paged(deal, page_size, random_());
      const DeviceDecode device(of, host, deal);
      const Shape fresh{of.options.tokens(), of.options.kv_heads, 64};
      const HostTensor new_k = random_tensor(random_, DType::bf16, fresh, 1.0);
      const HostTensor new_v = random_tensor(random_, DType::bf16, fresh, 1.0);
      device.append(new_k.view(), new_v.view());
      const DecodeProblem over = host.problem(of, deal);
      append_to_cache({new_k.view(),
                       new_v.view(),
                       over.query_begin,
                       host.k.view(),
                       host.v.view(),
                       over.page_table,
                       over.lengths,
                       deal,
                       {}});
      // Bits: most of both caches is NaN.
      EXPECT_TRUE(device.same_bits(device.problem().k, host.k.view()));
      EXPECT_TRUE(device.same_bits(device.problem().v, host.v.view()));
    }
  }
}

TEST_F(Sm90Decode, NamesWhatItDoesNotSupport) {
  const DecodeCase of(small_batch(64), random_());
  const PagedCache cache = of.paged({}, 16, random_());
  const DeviceDecode device(of, cache, {});
  const DecodeBackend& sm90 = decode_backends().front();
  const DecodeProblem good = device.problem();
  EXPECT_EQ(sm90.unsupported(good), "");
  DecodeProblem bad = good;
  bad.q.dtype = DType::f32;
  EXPECT_NE(sm90.unsupported(bad).find("f32"), std::string::npos);
  bad = good;
  bad.q.shape[2] = bad.k.shape[3] = bad.v.shape[3] = 80;
  EXPECT_NE(sm90.unsupported(bad).find("80"), std::string::npos);
  bad = good;
  bad.k.strides[1] = 129;
  EXPECT_NE(sm90.unsupported(bad).find("129"), std::string::npos);
  bad = good;
  bad.scale = -1.0F;
  EXPECT_NE(sm90.unsupported(bad).find("-1"), std::string::npos);
}

}  // namespace
}  // namespace annulus::testing
