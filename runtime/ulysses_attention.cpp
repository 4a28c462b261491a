#include "runtime/ulysses_attention.hpp"

#include "runtime/attention_operation.hpp"

namespace annulus {

OperationEntry ulysses_attention() {
  return {.names = {"ulysses"},
          .computes = "heads exchanged against rows along the sequence axis",
          .accepts =
              "documents, scale, causal (on), window, soft cap, sinks, cu_seqlens, mask, "
              "bias, dropout",
          .backends = "cpu, cuda, cudnn",
          .make = [](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<AttentionOperation>(
                name, metadata,
                AttentionOperation::Traits{
                    .causal = true, .key_rows = KeyRows::dealt, .scheme = Scheme::ulysses});
          }};
}

}  // namespace annulus
