#include "runtime/flash_attention.hpp"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/attention_operation.hpp"

namespace annulus {
namespace {

OperationEntry local_attention(std::vector<std::string> names, std::string computes,
                               AttentionOperation::Traits traits) {
  return {.names = std::move(names),
          .computes = std::move(computes),
          .accepts =
              "mask, documents, bias, dropout, sinks, scale, soft cap, causal (off), "
              "cu_seqlens, window",
          .backends = "cpu, cuda, cudnn",
          .make = [traits](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<AttentionOperation>(name, metadata, traits);
          }};
}

}  // namespace

OperationEntry flash_attention() {
  return local_attention({"flash_attn2", "flash"}, "flash attention, local to a rank", {});
}

OperationEntry sdpa_attention() {
  return local_attention({"sdpa", "cudnn", "cuda_flash_attn2"},
                         "flash attention, local to a rank, by the vendor library where it can",
                         {.vendor = true});
}

}  // namespace annulus
