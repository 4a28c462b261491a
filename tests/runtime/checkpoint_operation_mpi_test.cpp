// Operations over tensors of real models, read from files by every rank into its own layout.

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "runtime/checkpoint.hpp"
#include "runtime/context.hpp"
#include "runtime/operation_registry.hpp"
#include "runtime/redistribute.hpp"
#include "tests/runtime/operation_case.hpp"

namespace annulus::testing {
namespace {

Selection selection_of(const TensorLayout& layout, int rank) {
  Selection selection(layout.global_shape());
  for (int dim = 0; dim < layout.global_shape().rank(); ++dim) {
    selection.set(dim, layout.runs(rank, dim));
  }
  return selection;
}

struct Input {
  Checkpoint checkpoint;
  DistributedTensor query, key, value;

  Input(Context& context, const CheckpointRequest& request)
      : checkpoint(context.world(), request) {}

  void read(Context& context, const AttentionLayouts& layouts) {
    const auto field = [&](CheckpointField name, const TensorLayout& layout) {
      DistributedTensor tensor(checkpoint.dtype(name), layout, context.rank());
      checkpoint.read(context.world(), name, selection_of(layout, context.rank()), tensor.local());
      return tensor;
    };
    query = field(CheckpointField::query, layouts.query);
    key = field(CheckpointField::key, layouts.key);
    value = field(CheckpointField::value, layouts.value);
  }

  AttentionShape shape() const {
    const Shape& q = checkpoint.shape(CheckpointField::query);
    const Shape& k = checkpoint.shape(CheckpointField::key);
    const Shape& v = checkpoint.shape(CheckpointField::value);
    return {.batch = q[0],
            .seq_q = q[1],
            .seq_kv = k[1],
            .q_heads = q[2],
            .kv_heads = k[2],
            .head_dim = q[3],
            .value_dim = v[3]};
  }
};

/// The results that the file itself holds, read as if they were a query.
Tensor stored_outputs(Context& context, const std::string& path, const std::string& dataset) {
  CheckpointRequest request{.path = path, .datasets = {}};
  request.dataset(CheckpointField::query) = dataset;
  request.dataset(CheckpointField::key) = dataset;
  request.dataset(CheckpointField::value) = dataset;
  const Checkpoint checkpoint(context.world(), request);
  const Shape& shape = checkpoint.shape(CheckpointField::query);
  Tensor whole(DType::f32, shape);
  checkpoint.read(context.world(), CheckpointField::query, Selection(shape), whole.view());
  return whole;
}

void expect_stored_results(Context& context, const std::string& path, const std::string& outputs,
                           const std::string& documents, bool causal, const char* mesh_text,
                           double tolerance) {
  const Tensor expected = stored_outputs(context, path, outputs);
  CheckpointRequest request{.path = path, .datasets = {}};
  request.dataset(CheckpointField::documents) = documents;
  Input input(context, request);
  AttentionOptions options;
  options.causal = causal;
  if (!documents.empty()) {
    const std::vector<std::int64_t> ids =
        input.checkpoint.read_integers(context.world(), CheckpointField::documents);
    const std::vector<std::int32_t> row(ids.begin(), ids.end());
    options.mask.q_segments = options.mask.kv_segments = {segments_of(row)};
  }
  const Mesh mesh = Mesh::parse(mesh_text, context.size());
  for (const char* name : {"flash", "ring", "ulysses"}) {
    const auto operation =
        OperationRegistry::create(name, resolve_metadata(context, {.mesh = mesh}));
    input.read(context, operation->layouts(input.shape(), options));
    const OperationOutput output = (*operation)({input.query, input.key, input.value}, options);
    const Tensor whole = gather(output.attention_outputs, context.world());
    EXPECT_LE(max_difference(whole, expected), tolerance) << name << " on " << mesh_text;
  }
}

std::vector<const char*> meshes_of(int ranks) {
  switch (ranks) {
    case 1:
      return {"sp=1"};
    case 2:
      return {"sp=2", "tp=2"};
    case 4:
      return {"sp=4", "sp=2,tp=2"};
    case 6:
      return {"sp=6", "sp=2,tp=3"};
    default:
      return {"sp=-1"};
  }
}

TEST(CheckpointOperation, EqualsTheStoredReferenceOfALanguageModel) {
  Context context;
  for (const char* mesh : meshes_of(context.size())) {
    expect_stored_results(context, std::string(ANNULUS_TEST_DATA) + "/smollm_sample.h5",
                          "layers/14/attention/attention_outputs", "", true, mesh, 2e-5);
  }
}

/// Longer files lie outside the sources; the variable names their folder.
TEST(CheckpointOperation, EqualsTheStoredReferenceOfLongFiles) {
  const char* folder = std::getenv("ANNULUS_LONG_DATA");
  if (folder == nullptr) GTEST_SKIP() << "ANNULUS_LONG_DATA is not set";
  Context context;
  std::vector<const char*> meshes = meshes_of(context.size());
  if (context.size() == 3) meshes.push_back("tp=3");
  for (const char* mesh : meshes) {
    expect_stored_results(context, std::string(folder) + "/smollm_4096.h5",
                          "layers/1/attention/attention_outputs", "", true, mesh, 2e-5);
    expect_stored_results(context, std::string(folder) + "/minilm_packed.h5", "attention_outputs",
                          "documents", false, mesh, 2e-3);
  }
}

}  // namespace
}  // namespace annulus::testing
