#include "kernels/cudnn/sdpa_plan.hpp"

namespace annulus::kernels::cudnn {
namespace {

namespace fe = cudnn_frontend;

enum Uid : std::int64_t {
  kQ = 1,
  kK,
  kV,
  kO,
  kStats,
  kBias,
  kSinks,
  kGradO,
  kGradQ,
  kGradK,
  kGradV
};

fe::graph::SDPA_attributes options_of(const SdpaDescriptor& descriptor, fe::graph::Graph& graph) {
  fe::graph::SDPA_attributes options;
  options.set_name("sdpa")
      .set_generate_stats(descriptor.stats.present())
      .set_attn_scale(descriptor.scale);
  set_band(options, descriptor.band, descriptor.k.shape[2]);
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

std::unique_ptr<Plan> build(const SdpaDescriptor& descriptor) {
  auto plan = std::make_unique<Plan>();
  plan->set_types(descriptor.dtype);
  fe::graph::Graph& graph = plan->graph;
  const auto q = graph.tensor(attributes("q", kQ, descriptor.q));
  const auto k = graph.tensor(attributes("k", kK, descriptor.k));
  const auto v = graph.tensor(attributes("v", kV, descriptor.v));
  const auto [o, stats] = graph.sdpa(q, k, v, options_of(descriptor, graph));
  set_output(*o, kO, descriptor.o, descriptor.dtype);
  if (descriptor.stats.present()) set_output(*stats, kStats, descriptor.stats, DType::f32);
  plan->compile(descriptor.device);
  return plan;
}

std::unique_ptr<Plan> build_gradient(const SdpaGradientDescriptor& descriptor) {
  auto plan = std::make_unique<Plan>();
  plan->set_types(descriptor.dtype);
  fe::graph::Graph& graph = plan->graph;
  const auto q = graph.tensor(attributes("q", kQ, descriptor.q));
  const auto k = graph.tensor(attributes("k", kK, descriptor.k));
  const auto v = graph.tensor(attributes("v", kV, descriptor.v));
  const auto o = graph.tensor(attributes("o", kO, descriptor.o));
  const auto grad_o = graph.tensor(attributes("grad_o", kGradO, descriptor.grad_o));
  const auto stats = graph.tensor(
      attributes("stats", kStats, descriptor.stats).set_data_type(fe::DataType_t::FLOAT));
  fe::graph::SDPA_backward_attributes options;
  options.set_name("sdpa_backward")
      .set_attn_scale(descriptor.scale)
      .set_deterministic_algorithm(descriptor.deterministic);
  set_band(options, descriptor.band, descriptor.k.shape[2]);
  const auto [grad_q, grad_k, grad_v] = graph.sdpa_backward(q, k, v, o, grad_o, stats, options);
  set_output(*grad_q, kGradQ, descriptor.grad_q, descriptor.dtype);
  set_output(*grad_k, kGradK, descriptor.grad_k, descriptor.dtype);
  set_output(*grad_v, kGradV, descriptor.grad_v, descriptor.dtype);
  plan->compile(descriptor.device);
  return plan;
}

void* writable(const void* data) { return const_cast<void*>(data); }

}  // namespace

void run_sdpa(const SdpaDescriptor& descriptor, const SdpaPointers& pointers, cudaStream_t stream) {
  static PlanCache<SdpaDescriptor> plans;
  std::unordered_map<std::int64_t, void*> memory{{kQ, writable(pointers.q)},
                                                 {kK, writable(pointers.k)},
                                                 {kV, writable(pointers.v)},
                                                 {kO, pointers.o}};
  if (descriptor.stats.present()) memory[kStats] = pointers.stats;
  if (descriptor.bias.present()) memory[kBias] = writable(pointers.bias);
  if (descriptor.sinks) memory[kSinks] = writable(pointers.sinks);
  execute(plans.find(descriptor, build), descriptor.device, memory, stream);
}

void run_sdpa_gradient(const SdpaGradientDescriptor& descriptor,
                       const SdpaGradientPointers& pointers, cudaStream_t stream) {
  static PlanCache<SdpaGradientDescriptor> plans;
  std::unordered_map<std::int64_t, void*> memory{{kQ, writable(pointers.q)},
                                                 {kK, writable(pointers.k)},
                                                 {kV, writable(pointers.v)},
                                                 {kO, writable(pointers.o)},
                                                 {kGradO, writable(pointers.grad_o)},
                                                 {kStats, writable(pointers.stats)},
                                                 {kGradQ, pointers.grad_q},
                                                 {kGradK, pointers.grad_k},
                                                 {kGradV, pointers.grad_v}};
  execute(plans.find(descriptor, build_gradient), descriptor.device, memory, stream);
}

}  // namespace annulus::kernels::cudnn
