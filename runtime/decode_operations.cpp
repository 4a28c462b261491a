#include "runtime/decode_operations.hpp"

#include "runtime/decode_operation.hpp"

namespace annulus {
namespace {

OperationEntry entry(std::vector<std::string> names, std::string computes, std::string accepts,
                     const DecodeOperation::Traits& traits) {
  return {.names = std::move(names),
          .computes = std::move(computes),
          .accepts = std::move(accepts),
          .backends = "cpu, cuda",
          .make = [traits](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<DecodeOperation>(name, metadata, traits);
          }};
}

}  // namespace

OperationEntry autoregressive_decode() {
  return entry({"autoregressive_decodeattn"}, "one query token of each sequence against a KV cache",
               "starts, indexes, scale, window, soft cap, sinks",
               {.cache = DecodeOperation::Cache::given, .causal = false, .most_rows = 1});
}

OperationEntry ragged_page_attention_v2() {
  return entry({"ragged_page_attention_v2"},
               "prefill and decode rows mixed over a paged KV cache that holds them already",
               "a cache, query_begin, scale, causal (on), window, soft cap, sinks",
               {.cache = DecodeOperation::Cache::read});
}

OperationEntry ragged_page_attention_v3() {
  return entry({"ragged_page_attention_v3"},
               "the same, after writing the rows' keys and values to the cache",
               "a cache, query_begin, scale, causal (on), window, soft cap, sinks",
               {.cache = DecodeOperation::Cache::appended});
}

OperationEntry unified_attention() {
  return entry({"unified_attention"},
               "prefill and decode in one batch over a paged KV cache, packed or bthd",
               "a cache, query_begin, scale, causal (on), window, soft cap, sinks",
               {.cache = DecodeOperation::Cache::read});
}

OperationEntry paged_flash_attention() {
  return entry({"paged_flash_attention"}, "flash attention over a paged KV cache",
               "a cache, scale, causal (off), window, soft cap, sinks",
               {.cache = DecodeOperation::Cache::read, .causal = false});
}

OperationEntry multi_latent_ragged_page_attention() {
  return entry({"multi_latent_ragged_page_attention_v1", "multi_latent_ragged_page_attention_v2"},
               "multi-head latent attention over pages of latent and rope parts",
               "a latent cache, query_rope, key_rope, query_begin, scale, causal (on), window, "
               "soft cap, sinks",
               {.cache = DecodeOperation::Cache::latent});
}

}  // namespace annulus
