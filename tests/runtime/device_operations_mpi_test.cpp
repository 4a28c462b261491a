#include <gtest/gtest.h>

#include <algorithm>
#include <span>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"
#include "kernels/error.hpp"
#include "tests/runtime/operation_case.hpp"

// Operations on device tensors, through every transport, held against the double reference; several
// ranks may share one device. Needs a GPU of the Hopper generation:
//   mpirun -n 4 build/test_mpi --gtest_filter='*DeviceOperations*'
namespace annulus::testing {
namespace {

// P and O are each rounded to bf16, 8 bits of significand, and |O| stays below max |V| = √3.
constexpr double kTolerance = 2.0 * 0x1p-8 * 1.75;

class DeviceOperations : public ::testing::TestWithParam<Transport> {
 protected:
  void SetUp() override {
    context_ = std::make_unique<Context>();
    if (context_->device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  }

  // Inputs are bf16 values, so that the reference sees what the kernels see.
  static OperationTensors rounded_inputs(const OperationCase& c) {
    OperationTensors tensors = random_inputs(c);
    for (Tensor* tensor : {&tensors.query, &tensors.key, &tensors.value}) {
      const Tensor rounded = Tensor::copy_of(std::as_const(*tensor).view(), DType::bf16);
      *tensor = Tensor::copy_of(rounded.view(), DType::f32);
    }
    return tensors;
  }

  void expect_everywhere(const OperationCase& c) {
    OperationTensors tensors = rounded_inputs(c);
    if (context_->rank() == 0) run_reference(c, tensors, false);
    const OperationConfig config{
        .runtime_dtype = DType::bf16, .backend = "cuda", .transport = GetParam()};
    const int ranks = context_->size();
    for (const std::string& mesh : {fmt::format("sp={}", ranks), fmt::format("sp=-1,tp={}", 2)}) {
      if (mesh.find("tp") != std::string::npos && ranks % 2 != 0) continue;
      for (const char* operation : {"ring", "ulysses", "flash", "sdpa"}) {
        SCOPED_TRACE(operation);
        expect_forward(*context_, operation, Mesh::parse(mesh, ranks), c, tensors, kTolerance,
                       Placement::working, config);
      }
    }
  }

 private:
  std::unique_ptr<Context> context_;
};

constexpr AttentionShape kShape{.batch = 1,
                                .seq_q = 1000,
                                .seq_kv = 1000,
                                .q_heads = 8,
                                .kv_heads = 4,
                                .head_dim = 128,
                                .value_dim = 128};

TEST_P(DeviceOperations, CausalAndFull) {
  for (const bool causal : {true, false}) {
    AttentionOptions options;
    options.causal = causal;
    expect_everywhere({kShape, options, 41});
  }
}

TEST_P(DeviceOperations, WindowsAndDocuments) {
  AttentionOptions window;
  window.causal = true;
  window.mask.window_left = 150;
  expect_everywhere({kShape, window, 42});
  AttentionOptions documents;
  documents.causal = true;
  constexpr std::int64_t kOffsets[] = {0, 70, 71, 640, 1000};
  documents.mask.q_segments = {segments_of_offsets(kOffsets, 1000)};
  documents.mask.kv_segments = documents.mask.q_segments;
  expect_everywhere({kShape, documents, 43});
}

TEST_P(DeviceOperations, BalancedRowsAndUnevenLengths) {
  AttentionOptions options;
  options.causal = true;
  options.deal = SequenceDeal::zigzag;
  AttentionShape shape = kShape;
  shape.seq_q = shape.seq_kv = 777;
  shape.head_dim = shape.value_dim = 64;
  expect_everywhere({shape, options, 44});
}

TEST_P(DeviceOperations, RefuseToPromiseTheSameBits) {
  AttentionOptions options;
  options.reproducible = true;
  EXPECT_THROW(expect_everywhere({kShape, options, 45}), Error);
}

// The vendor library's bits where it serves, those of the kernels here where it does not.
TEST(DeviceSdpa, IsTheVendorsWhereItServes) {
  Context context;
  if (context.device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  const std::span<const AttentionBackend> kernels = attention_backends();
  if (std::none_of(kernels.begin(), kernels.end(),
                   [](const AttentionBackend& kernel) { return kernel.name == "cudnn"; })) {
    GTEST_SKIP() << "built without cuDNN";
  }
  OperationCase c{kShape, {}, 46};
  c.options.causal = true;
  c.options.output_dtype = DType::f32;
  const OperationTensors tensors = random_inputs(c);
  // Heads are shared out, so that every rank has whole sequences, as the vendor library wants.
  const auto output_of = [&](const std::string& operation, const std::string& backend) {
    const OperationConfig config{.runtime_dtype = DType::bf16, .backend = backend};
    return run_both_passes(context, operation, Mesh::parse("tp=-1", context.size()), c, tensors,
                           config)
        .output;
  };
  const auto is_same = [&](const Tensor& a, const Tensor& b) {
    return context.rank() != 0 || max_difference(a, b) == 0.0;
  };
  const Tensor found = output_of("sdpa", "cuda");
  const Tensor vendors = output_of("flash", "cudnn");
  const Tensor ours = output_of("flash", "cuda");
  EXPECT_TRUE(is_same(found, vendors));
  EXPECT_TRUE(context.rank() != 0 || !is_same(found, ours));
  c.options.soft_cap = 5.0F;
  EXPECT_TRUE(is_same(output_of("sdpa", "cuda"), output_of("flash", "cuda")));
}

INSTANTIATE_TEST_SUITE_P(Transports, DeviceOperations,
                         ::testing::Values(Transport::peer, Transport::nccl, Transport::mpi),
                         [](const auto& info) { return std::string(name(info.param)); });

}  // namespace
}  // namespace annulus::testing
