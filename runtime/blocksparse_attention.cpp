#include "runtime/blocksparse_attention.hpp"

#include "runtime/attention_operation.hpp"

namespace annulus {

OperationEntry blocksparse_attention() {
  return {
      .names = {"blocksparse", "splash"},
      .computes = "attention under a mask of kept blocks, over the sequence axis",
      .accepts =
          "kept blocks, documents, scale, causal (on), window, soft cap, sinks, cu_seqlens, mask, "
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
