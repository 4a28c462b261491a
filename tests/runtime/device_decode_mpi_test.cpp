#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/runtime/decode_checks.hpp"

// The operations over a cache on device tensors, held against the double reference; several ranks
// may share one device. Needs a GPU of the Hopper generation:
//   mpirun -n 4 build/test_mpi --gtest_filter='*DeviceDecode*'
namespace annulus::testing {
namespace {

class DeviceDecode : public ::testing::TestWithParam<Transport> {
 protected:
  void SetUp() override {
    context_ = std::make_unique<Context>();
    if (context_->device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  }

  std::vector<DecodePlace> places() const {
    std::vector<DecodePlace> all = decode_places(context_->size());
    for (DecodePlace& place : all) {
      place.backend = "cuda";
      place.transport = GetParam();
    }
    all.push_back(all.front());
    all.back().page_size = 16;
    all.back().block = 0;
    return all;
  }

  static DecodeOptions whole_sequences(DType dtype) {
    DecodeOptions options;
    options.dtype = dtype;
    options.sequences = {{13, 13}, {40, 40}, {1, 1}, {127, 127}, {9, 9}};
    options.q_heads = 8;
    options.kv_heads = 4;
    options.head_dim = options.value_dim = 128;
    return options;
  }

  std::unique_ptr<Context> context_;
};

INSTANTIATE_TEST_SUITE_P(Transports, DeviceDecode,
                         ::testing::Values(Transport::peer, Transport::nccl, Transport::mpi),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST_P(DeviceDecode, ChunksOfPrefillThenDecodeEqualOneForward) {
  for (const char* operation :
       {"ragged_page_attention_v2", "ragged_page_attention_v3", "unified_attention"}) {
    DecodeOptions options = whole_sequences(operation[0] == 'u' ? DType::f16 : DType::bf16);
    if (operation[22] == '2') options.window_left = 11;
    if (operation[22] == '3') options.sinks = true;
    const DecodeCase expected(options, 51);
    for (const DecodePlace& place : places()) {
      SCOPED_TRACE(fmt::format("{} {} pages of {}", operation, place.mesh, place.page_size));
      expect_chunks(*context_, operation, place, expected, 7);
    }
  }
}

TEST_P(DeviceDecode, LatentChunksEqualOneForward) {
  DecodeOptions options = whole_sequences(DType::bf16);
  options.kv_heads = 1;
  options.head_dim = 576;
  options.value_dim = 512;
  options.latent = true;
  const DecodeCase expected(options, 52);
  for (const char* version : {"v1", "v2"}) {
    for (const DecodePlace& place : places()) {
      SCOPED_TRACE(fmt::format("{} {} pages of {}", version, place.mesh, place.page_size));
      expect_chunks(*context_, fmt::format("multi_latent_ragged_page_attention_{}", version), place,
                    expected, 8);
    }
  }
}

TEST_P(DeviceDecode, AutoregressiveDecodeReadsTensors) {
  DecodeOptions options = whole_sequences(DType::bf16);
  options.sequences = {{1, 70}, {1, 33, 5}, {1, 1}, {1, 640, 63}};
  options.causal = false;
  const DecodeCase expected(options, 53);
  for (const DecodePlace& place : places()) {
    SCOPED_TRACE(place.mesh);
    expect_autoregressive(*context_, place, expected);
  }
}

TEST_P(DeviceDecode, PagedFlashTakesBatches) {
  DecodeOptions options = whole_sequences(DType::f16);
  options.sequences = {{6, 50}, {6, 9}, {6, 210}, {6, 6}};
  for (const bool causal : {false, true}) {
    options.causal = causal;
    const DecodeCase of(options, 54);
    for (const DecodePlace& place : places()) {
      SCOPED_TRACE(fmt::format("{} pages of {}", place.mesh, place.page_size));
      expect_paged_flash(*context_, place, of);
    }
  }
}

}  // namespace
}  // namespace annulus::testing
