#pragma once

#include <cstdint>
#include <vector>

#include "kernels/types.hpp"

namespace annulus {

/// A boolean array, row-major, a byte an element (1 keeps).
struct DenseMask {
  Shape shape;
  std::vector<std::uint8_t> values;

  ConstTensorView view() const { return {values.data(), DType::u8, shape}; }
  friend bool operator==(const DenseMask&, const DenseMask&) = default;
};

/// Which queries see any key, and which keys any query sees.
struct SplitMask {
  DenseMask query;  // [batch, seq_q]
  DenseMask kv;     // [batch, seq_kv]
};

/// Splits a u8 mask on the host, [batch, seq_q, seq_kv] or [batch, heads, seq_q, seq_kv]; of heads
/// the last one counts. Throws bad_data for another rank or dtype, or no heads.
SplitMask split_attention_mask(const ConstTensorView& mask);

/// [batch, seq_q] and [batch, seq_kv] to [batch, seq_q, seq_kv]: both must keep. Throws bad_data
/// for other ranks or unequal batches.
DenseMask combine_query_kv_masks(const DenseMask& query, const DenseMask& kv);

/// [tokens, tokens]: a query keeps the keys up to itself.
DenseMask create_causal_mask(std::int64_t tokens);

}  // namespace annulus
