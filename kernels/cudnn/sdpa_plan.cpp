#include "kernels/cudnn/sdpa_plan.hpp"

#include <cudnn_frontend.h>

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/cuda/check.hpp"
#include "kernels/cudnn_support.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cudnn {
namespace {

namespace fe = cudnn_frontend;

enum Uid : std::int64_t { kQ = 1, kK, kV, kO, kStats, kBias, kSinks };

void check(cudnnStatus_t status, const char* call) {
  require(status == CUDNN_STATUS_SUCCESS, ExitCode::internal, "cudnn: {} failed: {}", call,
          cudnnGetErrorString(status));
}

struct HandleDeleter {
  void operator()(cudnnHandle_t handle) const { cudnnDestroy(handle); }
};

/// A handle belongs to one thread and one device.
cudnnHandle_t handle_of(int device) {
  thread_local std::map<int, std::unique_ptr<cudnnContext, HandleDeleter>> handles;
  std::unique_ptr<cudnnContext, HandleDeleter>& handle = handles[device];
  if (handle == nullptr) {
    cudnnHandle_t created = nullptr;
    check(cudnnCreate(&created), "cudnnCreate");
    handle.reset(created);
  }
  return handle.get();
}

fe::DataType_t data_type(DType dtype) {
  return dtype == DType::f16 ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16;
}

fe::graph::Tensor_attributes attributes(const char* name, Uid uid, const TensorLayout& layout) {
  return fe::graph::Tensor_attributes()
      .set_name(name)
      .set_uid(uid)
      .set_dim({layout.shape.begin(), layout.shape.end()})
      .set_stride({layout.strides.begin(), layout.strides.end()});
}

fe::graph::SDPA_attributes options_of(const SdpaDescriptor& descriptor, fe::graph::Graph& graph) {
  fe::graph::SDPA_attributes options;
  options.set_name("sdpa")
      .set_generate_stats(descriptor.stats.present())
      .set_attn_scale(descriptor.scale);
  if (descriptor.diagonal != Diagonal::none) {
    options.set_diagonal_alignment(descriptor.diagonal == Diagonal::top_left
                                       ? fe::DiagonalAlignment_t::TOP_LEFT
                                       : fe::DiagonalAlignment_t::BOTTOM_RIGHT);
  }
  if (descriptor.causal) options.set_diagonal_band_right_bound(0);
  // cuDNN counts the diagonal itself.
  if (descriptor.left_bound > 0) {
    options.set_diagonal_band_left_bound(static_cast<int>(descriptor.left_bound));
  }
  if (descriptor.bias.present()) {
    options.set_bias(graph.tensor(attributes("bias", kBias, descriptor.bias)));
  }
  if (descriptor.sinks) {
    const std::int64_t heads = descriptor.q.shape[1];
    const TensorLayout layout{{1, heads, 1, 1}, {heads, 1, 1, 1}};
    options.set_sink_token(
        graph.tensor(attributes("sinks", kSinks, layout).set_data_type(fe::DataType_t::FLOAT)));
  }
  return options;
}

/// A compiled graph, or why there is none.
struct Plan {
  fe::graph::Graph graph;
  std::string refusal;
  std::int64_t workspace_bytes = 0;
};

std::unique_ptr<Plan> build(const SdpaDescriptor& descriptor) {
  auto plan = std::make_unique<Plan>();
  fe::graph::Graph& graph = plan->graph;
  graph.set_io_data_type(data_type(descriptor.dtype))
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const auto q = graph.tensor(attributes("q", kQ, descriptor.q));
  const auto k = graph.tensor(attributes("k", kK, descriptor.k));
  const auto v = graph.tensor(attributes("v", kV, descriptor.v));
  const auto [o, stats] = graph.sdpa(q, k, v, options_of(descriptor, graph));
  o->set_output(true)
      .set_uid(kO)
      .set_dim({descriptor.o.shape.begin(), descriptor.o.shape.end()})
      .set_stride({descriptor.o.strides.begin(), descriptor.o.strides.end()});
  if (descriptor.stats.present()) {
    stats->set_output(true)
        .set_uid(kStats)
        .set_data_type(fe::DataType_t::FLOAT)
        .set_dim({descriptor.stats.shape.begin(), descriptor.stats.shape.end()})
        .set_stride({descriptor.stats.strides.begin(), descriptor.stats.strides.end()});
  }
  fe::error_t error = graph.build(handle_of(descriptor.device), {fe::HeurMode_t::A});
  if (error.is_bad()) plan->refusal = error.get_message();
  if (error.is_good()) plan->workspace_bytes = graph.get_workspace_size();
  return plan;
}

Plan& plan_of(const SdpaDescriptor& descriptor) {
  static std::mutex mutex;
  static std::map<SdpaDescriptor, std::unique_ptr<Plan>> plans;
  const std::scoped_lock lock(mutex);
  std::unique_ptr<Plan>& plan = plans[descriptor];
  if (plan == nullptr) plan = build(descriptor);
  return *plan;
}

}  // namespace

const char* version() {
  static const std::string text = [] {
    const std::size_t number = cudnnGetVersion();
    return fmt::format("{}.{}.{}", number / 10000, number / 100 % 100, number % 100);
  }();
  return text.c_str();
}

std::string sdpa_refusal(const SdpaDescriptor& descriptor) { return plan_of(descriptor).refusal; }

void run_sdpa(const SdpaDescriptor& descriptor, const SdpaPointers& pointers, cudaStream_t stream) {
  Plan& plan = plan_of(descriptor);
  require(plan.refusal.empty(), ExitCode::usage, "cudnn: {}", plan.refusal);
  cudnnHandle_t handle = handle_of(descriptor.device);
  check(cudnnSetStream(handle, stream), "cudnnSetStream");
  const Buffer workspace(Device::cuda, plan.workspace_bytes, {stream});
  std::unordered_map<std::int64_t, void*> memory{{kQ, const_cast<void*>(pointers.q)},
                                                 {kK, const_cast<void*>(pointers.k)},
                                                 {kV, const_cast<void*>(pointers.v)},
                                                 {kO, pointers.o}};
  if (descriptor.stats.present()) memory[kStats] = pointers.stats;
  if (descriptor.bias.present()) memory[kBias] = const_cast<void*>(pointers.bias);
  if (descriptor.sinks) memory[kSinks] = const_cast<void*>(pointers.sinks);
  fe::error_t error = plan.graph.execute(handle, memory, workspace.data());
  require(error.is_good(), ExitCode::internal, "cudnn: execution failed: {}", error.get_message());
}

}  // namespace annulus::kernels::cudnn
