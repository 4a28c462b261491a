#include "sharding/dense_mask.hpp"

#include "kernels/error.hpp"

namespace annulus {
namespace {

DenseMask zeros(const Shape& shape) {
  return {shape, std::vector<std::uint8_t>(static_cast<std::size_t>(shape.elements()), 0)};
}

/// [batch, seq_q, seq_kv] of the last head.
ConstTensorView last_head(const ConstTensorView& mask) {
  require(mask.dtype == DType::u8 && mask.device == Device::cpu, ExitCode::bad_data,
          "mask: expected u8 on the host, found {} on {}", name(mask.dtype), name(mask.device));
  require(mask.rank() == 3 || (mask.rank() == 4 && mask.shape[1] > 0), ExitCode::bad_data,
          "mask: expected [batch, seq_q, seq_kv] or [batch, heads, seq_q, seq_kv], found {}",
          mask.shape.to_string());
  if (mask.rank() == 3) return mask;
  const std::int64_t head = mask.shape[1] - 1;
  const ConstTensorView one = mask.slice(1, {head, head + 1});
  return {one.data, one.dtype, Shape{one.shape[0], one.shape[2], one.shape[3]},
          Shape{one.strides[0], one.strides[2], one.strides[3]}};
}

bool kept(const ConstTensorView& mask, std::int64_t b, std::int64_t q, std::int64_t k) {
  const auto* bytes = static_cast<const std::uint8_t*>(mask.data);
  return bytes[b * mask.strides[0] + q * mask.strides[1] + k * mask.strides[2]] != 0;
}

}  // namespace

SplitMask split_attention_mask(const ConstTensorView& mask) {
  const ConstTensorView rows = last_head(mask);
  const std::int64_t batch = rows.shape[0], seq_q = rows.shape[1], seq_kv = rows.shape[2];
  SplitMask split{zeros({batch, seq_q}), zeros({batch, seq_kv})};
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t q = 0; q < seq_q; ++q) {
      for (std::int64_t k = 0; k < seq_kv; ++k) {
        if (!kept(rows, b, q, k)) continue;
        split.query.values[static_cast<std::size_t>(b * seq_q + q)] = 1;
        split.kv.values[static_cast<std::size_t>(b * seq_kv + k)] = 1;
      }
    }
  }
  return split;
}

DenseMask combine_query_kv_masks(const DenseMask& query, const DenseMask& kv) {
  require(query.shape.rank() == 2 && kv.shape.rank() == 2 && query.shape[0] == kv.shape[0],
          ExitCode::bad_data,
          "mask: query mask {} and kv mask {} must be [batch, tokens] of the same batch",
          query.shape.to_string(), kv.shape.to_string());
  const std::int64_t batch = query.shape[0], seq_q = query.shape[1], seq_kv = kv.shape[1];
  DenseMask both{{batch, seq_q, seq_kv}, {}};
  for (std::int64_t row = 0; row < batch * seq_q; ++row) {
    const bool query_kept = query.values[static_cast<std::size_t>(row)] != 0;
    for (std::int64_t k = 0; k < seq_kv; ++k) {
      const bool kv_kept = kv.values[static_cast<std::size_t>(row / seq_q * seq_kv + k)] != 0;
      both.values.push_back(query_kept && kv_kept ? 1 : 0);
    }
  }
  return both;
}

DenseMask create_causal_mask(std::int64_t tokens) {
  DenseMask mask{{tokens, tokens}, {}};
  for (std::int64_t i = 0; i < tokens * tokens; ++i) {
    mask.values.push_back(i % tokens <= i / tokens ? 1 : 0);
  }
  return mask;
}

}  // namespace annulus
