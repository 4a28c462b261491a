#include "runtime/operations.hpp"

#include <array>

#include "runtime/auto_attention.hpp"
#include "runtime/blocksparse_attention.hpp"
#include "runtime/decode_operations.hpp"
#include "runtime/flash_attention.hpp"
#include "runtime/hybrid_attention.hpp"
#include "runtime/ring_attention.hpp"
#include "runtime/ulysses_attention.hpp"
#include "runtime/vanilla_attention.hpp"

namespace annulus {

std::span<const OperationEntry> operations() {
  static const std::array kOperations = {
      vanilla_attention(),        flash_attention(),
      ring_attention(),           sdpa_attention(),
      ulysses_attention(),        hybrid_attention(),
      blocksparse_attention(),    auto_attention(),
      autoregressive_decode(),    ragged_page_attention_v2(),
      ragged_page_attention_v3(), unified_attention(),
      paged_flash_attention(),    multi_latent_ragged_page_attention(),
  };
  return kOperations;
}

}  // namespace annulus
