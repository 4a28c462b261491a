#include "runtime/sequence_attention.hpp"

#include <utility>

#include "runtime/attention_operation.hpp"

namespace annulus {

OperationEntry sequence_attention(std::vector<std::string> names, std::string computes,
                                  Scheme scheme, std::string_view accepts_besides) {
  return {.names = std::move(names),
          .computes = std::move(computes),
          .accepts = std::string(accepts_besides) +
                     "documents, scale, causal (on), window, soft cap, sinks, cu_seqlens, mask, "
                     "bias, dropout",
          .backends = "cpu, cuda, cudnn",
          .make = [scheme](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<AttentionOperation>(
                name, metadata,
                AttentionOperation::Traits{
                    .causal = true, .key_rows = KeyRows::dealt, .scheme = scheme});
          }};
}

}  // namespace annulus
