#include "runtime/operation.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "kernels/buffer.hpp"
#include "runtime/operation_registry.hpp"
#include "tests/runtime/operation_case.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

/// Says which of its forms ran.
class Probe : public OperationImpl {
 public:
  using OperationImpl::OperationImpl;
  OperationOutput forward_native(const AttentionInputs& /*i*/,
                                 const AttentionOptions& /*o*/) override {
    ran += "native ";
    return {};
  }
  AttentionLayouts layouts(const AttentionShape& /*shape*/,
                           const AttentionOptions& /*options*/) const override {
    throw Error(ExitCode::internal, "probe: no layouts");
  }
  bool caches_by_default() const override { return true; }

  std::string ran;
};

class GpuProbe : public Probe {
 public:
  using Probe::Probe;
  OperationOutput forward_gpu(const AttentionInputs& i, const AttentionOptions& o) override {
    ran += "gpu ";
    return Probe::forward_gpu(i, o);
  }
};

template <typename Operation>
std::string forms_run(Context& context, const std::string& backend) {
  Operation probe("probe",
                  resolve_metadata(context, {.backend = backend, .mesh = Mesh::standard(1)}));
  const DistributedTensor none;
  probe(AttentionInputs{none, none, none});
  return probe.ran;
}

void with_one_rank(const std::function<void(Context&)>& body) {
  run_ranks(1, [&](Communicator& ranks) {
    Context context(ranks);
    body(context);
  });
}

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(OperationImpl, FallsBackAlongTheChain) {
  with_one_rank([](Context& context) {
    for (const char* backend : {"cpu", "gpu", "cuda", "cudnn", "rocm"}) {
      EXPECT_EQ(forms_run<Probe>(context, backend), "native ") << backend;
    }
    EXPECT_EQ(forms_run<GpuProbe>(context, "cpu"), "native ");
    EXPECT_EQ(forms_run<GpuProbe>(context, "cuda"), "gpu native ");
    EXPECT_EQ(forms_run<GpuProbe>(context, "rocm"), "gpu native ");
    EXPECT_EQ(error_of([&] { forms_run<Probe>(context, "tpu"); }),
              "probe: unknown backend 'tpu'; known are cpu, gpu, cuda, cudnn, rocm");
  });
}

TEST(OperationImpl, TheEnvironmentForcesNative) {
  with_one_rank([](Context& context) {
    for (const char* value : {"true", "yes", "ok", "1", "TRUE"}) {
      setenv("FORCE_NATIVE_RUNTIME", value, 1);
      EXPECT_EQ(forms_run<GpuProbe>(context, "cuda"), "native ") << value;
    }
    for (const char* value : {"0", "false", ""}) {
      setenv("FORCE_NATIVE_RUNTIME", value, 1);
      EXPECT_EQ(forms_run<GpuProbe>(context, "cuda"), "gpu native ") << value;
    }
    unsetenv("FORCE_NATIVE_RUNTIME");
  });
}

TEST(OperationMetadata, HasTheDefaults) {
  run_ranks(8, [](Communicator& ranks) {
    Context context(ranks);
    const OperationMetadata metadata =
        resolve_metadata(context, {.mesh = Mesh::parse("sp=4,tp=2", 8)});
    EXPECT_EQ(metadata.runtime_dtype, DType::f32);
    EXPECT_EQ(metadata.runtime_softmax_dtype, DType::f32);
    EXPECT_EQ(metadata.sequence_axis_name, "sp");
    EXPECT_EQ(metadata.backend, "cpu");
    EXPECT_FALSE(metadata.requires_cache.has_value());
    EXPECT_FALSE(metadata.softmax_scale.has_value());
    EXPECT_EQ(metadata.dropout_prob, 0.0F);
    EXPECT_TRUE(metadata.operation_configs.empty());
    EXPECT_EQ(metadata.partition_manager.axis(), PartitionAxis{});
  });
}

TEST(OperationMetadata, TakesGivenBeforeBaseBeforeDefault) {
  with_one_rank([](Context& context) {
    const OperationConfig base{.runtime_dtype = DType::bf16,
                               .mesh = Mesh::standard(1),
                               .softmax_scale = 0.5F,
                               .dropout_prob = 0.25F};
    const OperationMetadata metadata =
        resolve_metadata(context, {.runtime_dtype = DType::f16, .softmax_scale = 2.0F}, base);
    EXPECT_EQ(metadata.runtime_dtype, DType::f16);
    EXPECT_EQ(metadata.softmax_scale, 2.0F);
    EXPECT_EQ(metadata.dropout_prob, 0.25F);
    EXPECT_EQ(metadata.runtime_softmax_dtype, DType::f32);
    const OperationMetadata renamed =
        resolve_metadata(context, {.sequence_axis_name = "cp", .mesh = Mesh({{"cp", 1}}, 1)});
    EXPECT_EQ(renamed.partition_manager.axis().query_length.train, AxisTuple{"cp"});
  });
}

TEST(OperationMetadata, RefusesWhatCannotBe) {
  with_one_rank([](Context& context) {
    const Mesh mesh = Mesh::standard(1);
    EXPECT_EQ(error_of([&] { resolve_metadata(context, {}); }),
              "metadata: pass a mesh, such as Mesh::parse(\"sp=1\", 1)");
    EXPECT_EQ(error_of([&] { resolve_metadata(context, {.mesh = Mesh::standard(2)}); }),
              "metadata: mesh dp=1,fsdp=2,ep=1,tp=1,sp=1 has 2 ranks, 1 run");
    EXPECT_EQ(
        error_of([&] { resolve_metadata(context, {.runtime_dtype = DType::f64, .mesh = mesh}); }),
        "metadata: runtime_dtype f64 is not f32, f16 or bf16");
    EXPECT_EQ(
        error_of([&] { resolve_metadata(context, {.sequence_axis_name = "cp", .mesh = mesh}); }),
        "metadata: sequence_axis_name is 'cp', which mesh " + mesh.to_string() + " has not");
    EXPECT_NE(error_of([&] {
                resolve_metadata(context, {.sequence_axis_name = "cp",
                                           .partition_axis = PartitionAxis{},
                                           .mesh = Mesh({{"cp", 1}}, 1)});
              }).find("sequence_axis_name is 'cp' but the partition axis"),
              std::string::npos);
  });
}

OperationEntry probe_entry(std::vector<std::string> names) {
  return {.names = std::move(names),
          .computes = "nothing",
          .accepts = "",
          .backends = "cpu",
          .make = [](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<Probe>(name, metadata);
          }};
}

TEST(OperationRegistry, ListsInOrderOfRegistrationAndNamesThemWhenAskedForAnother) {
  const std::vector<std::string> names = OperationRegistry::list_implementations();
  const std::vector<std::string> first = {"vanilla", "flash_attn2", "flash", "ring", "sdpa"};
  ASSERT_GE(names.size(), first.size());
  EXPECT_EQ(std::vector<std::string>(names.begin(), names.begin() + 5), first);
  const std::string said = error_of([] { OperationRegistry::get("rnig"); });
  EXPECT_NE(said.find("unknown operation 'rnig'; known are vanilla, flash_attn2, flash, ring"),
            std::string::npos)
      << said;
}

TEST(OperationRegistry, AnAliasCreatesTheSameOperation) {
  with_one_rank([](Context& context) {
    const OperationMetadata metadata = resolve_metadata(context, {.mesh = Mesh::standard(1)});
    EXPECT_EQ(OperationRegistry::create("flash", metadata)->name(), "flash_attn2");
    EXPECT_EQ(OperationRegistry::create("cudnn", metadata)->name(), "sdpa");
    EXPECT_EQ(OperationRegistry::create("cuda_flash_attn2", metadata)->name(), "sdpa");
    EXPECT_FALSE(OperationRegistry::create("flash", metadata)->causal_by_default());
    EXPECT_TRUE(OperationRegistry::create("ring", metadata)->causal_by_default());
  });
}

TEST(OperationRegistry, ProgramsRegisterTheirOwnAndOverwriteWithAWarning) {
  OperationRegistry::register_operation(probe_entry({"probe", "sonde"}));
  EXPECT_EQ(OperationRegistry::list_implementations().back(), "sonde");
  const auto count = OperationRegistry::list_implementations().size();
  ::testing::internal::CaptureStderr();
  OperationRegistry::register_operation(probe_entry({"sonde"}));
  const std::string warning = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(warning.find("operation 'sonde' is registered again"), std::string::npos) << warning;
  EXPECT_EQ(OperationRegistry::list_implementations().size(), count);
  EXPECT_EQ(OperationRegistry::get("sonde").names.size(), 1U);
  EXPECT_EQ(OperationRegistry::get("probe").names.size(), 2U);
}

TEST(OperationRegistry, RequiresCacheCanBeOverriddenForAnInstance) {
  OperationRegistry::register_operation(probe_entry({"cache probe"}));
  with_one_rank([](Context& context) {
    const OperationMetadata plain = resolve_metadata(context, {.mesh = Mesh::standard(1)});
    OperationMetadata off = plain;
    off.requires_cache = false;
    EXPECT_TRUE(OperationRegistry::create("cache probe", plain)->requires_cache());
    EXPECT_FALSE(OperationRegistry::create("cache probe", off)->requires_cache());
    EXPECT_TRUE(OperationRegistry::create("cache probe", off, true)->requires_cache());
    EXPECT_FALSE(OperationRegistry::create("ring", plain)->requires_cache());
  });
}

}  // namespace
}  // namespace annulus::testing
