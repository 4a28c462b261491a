#include "runtime/hybrid_attention.hpp"

#include "runtime/attention_operation.hpp"

namespace annulus {

OperationEntry hybrid_attention() {
  return {.names = {"hybrid"},
          .computes = "heads exchanged inside a node, keys and values moved between nodes",
          .accepts =
              "documents, scale, causal (on), window, soft cap, sinks, cu_seqlens, mask, "
              "bias, dropout",
          .backends = "cpu, cuda, cudnn",
          .make = [](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<AttentionOperation>(
                name, metadata,
                AttentionOperation::Traits{
                    .causal = true, .key_rows = KeyRows::dealt, .scheme = Scheme::hybrid});
          }};
}

}  // namespace annulus
