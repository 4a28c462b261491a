#include "runtime/flash_attention.hpp"

#include "runtime/attention_operation.hpp"

namespace annulus {

OperationEntry flash_attention() {
  return {.names = {"flash_attn2", "flash"},
          .computes = "flash attention, local to a rank",
          .accepts =
              "mask, documents, bias, dropout, sinks, scale, soft cap, causal (off), "
              "cu_seqlens, window",
          .backends = "cpu, cuda, cudnn",
          .make = [](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<AttentionOperation>(name, metadata,
                                                        AttentionOperation::Traits{});
          }};
}

}  // namespace annulus
