#include "runtime/ring_attention.hpp"

#include "runtime/attention_operation.hpp"

namespace annulus {

OperationEntry ring_attention() {
  return {.names = {"ring"},
          .computes = "ring attention over the sequence axis",
          .accepts =
              "documents, scale, causal (on), window, soft cap, sinks, cu_seqlens, mask, "
              "bias, dropout",
          .backends = "cpu, cuda, cudnn",
          .make = [](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<AttentionOperation>(
                name, metadata,
                AttentionOperation::Traits{
                    .causal = true, .key_rows = KeyRows::dealt, .scheme = Scheme::ring});
          }};
}

}  // namespace annulus
