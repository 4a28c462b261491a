#pragma once

#include "runtime/operation_registry.hpp"

namespace annulus {

/// Operations over a cache. Their names, and what their arguments mean, are EasyDeL's: its
/// pages_tables and context_lens are the cache's, its query_start_loc is query_begin, and a sliding
/// window of W tokens is the window W − 1, 0 here.

/// One query token of each sequence against a contiguous cache, tokens [starts, indexes).
OperationEntry autoregressive_decode();

/// Prefill and decode rows mixed, over pages that hold the rows' own keys already.
OperationEntry ragged_page_attention_v2();
/// The same, given the rows' keys and values, which it writes to the cache first.
OperationEntry ragged_page_attention_v3();

/// As ragged_page_attention_v2; queries packed or [batch, seq, heads, dim].
OperationEntry unified_attention();
/// Queries [batch, seq, heads, dim], causal only on request.
OperationEntry paged_flash_attention();

/// Pages of latent keys with a rope part, queries absorbed; writes the rows' keys first.
OperationEntry multi_latent_ragged_page_attention();

}  // namespace annulus
