#include "runtime/vanilla_attention.hpp"

#include "runtime/attention_operation.hpp"

namespace annulus {

OperationEntry vanilla_attention() {
  return {.names = {"vanilla"},
          .computes = "dense attention; returns attention_weights on request",
          .accepts = "mask, bias, dropout, sinks, scale, soft cap, causal (off), window, documents",
          .backends = "cpu, cuda",
          .make = [](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<AttentionOperation>(
                name, metadata, AttentionOperation::Traits{.weights = true});
          }};
}

}  // namespace annulus
