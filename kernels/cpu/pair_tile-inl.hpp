// Tensors with one element for each (query, key): read and written as tiles [keys, lanes].
#if defined(ANNULUS_CPU_PAIR_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_PAIR_TILE_INL
#undef ANNULUS_CPU_PAIR_TILE_INL
#else
#define ANNULUS_CPU_PAIR_TILE_INL
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/element.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Room for a tile's rows before they are transposed, [lanes, keys].
inline constexpr std::int64_t kPairRowStride = kKeyTile + 16;
inline constexpr std::int64_t kPairRowsFloats = kTileLanes * kPairRowStride;

inline void load_pair_row(const ConstTensorView& view, std::int64_t at, std::int64_t keys,
                          float* HWY_RESTRICT to) {
  const std::int64_t stride = view.strides[3];
  if (view.dtype == DType::u8) {
    const auto* from = static_cast<const std::uint8_t*>(view.data) + at;
    for (std::int64_t k = 0; k < keys; ++k) to[k] = from[k * stride] != 0 ? 1.0F : 0.0F;
    return;
  }
  const std::int64_t whole = stride == 1 ? keys / 8 * 8 : 0;
  load_row(view.data, view.dtype, at, whole, to);
  for (std::int64_t k = whole; k < keys; ++k) {
    to[k] = static_cast<float>(load_element(view.data, view.dtype, at + k * stride));
  }
}

/// tile[key, lane] ← view[batch, head, query, key] of each lane; `rows_buffer` holds
/// kPairRowsFloats. A u8 view becomes 0 or 1.
inline void load_pair_tile(const ConstTensorView& view, std::int64_t batch, const TileRows& rows,
                           Span keys, float* HWY_RESTRICT rows_buffer, float* HWY_RESTRICT tile) {
  for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
    const auto i = static_cast<std::size_t>(lane);
    const std::int64_t at = pair_offset(view, batch, rows.head[i], rows.query[i]);
    load_pair_row(view, at + keys.begin * view.strides[3], keys.size(),
                  rows_buffer + lane * kPairRowStride);
  }
  transpose(rows_buffer, kPairRowStride, kTileLanes, round_up(keys.size(), 4), tile, kTileLanes);
}

/// view[batch, head, query, key] += tile[key, lane], lane after lane.
inline void add_pair_tile(const TensorView& view, std::int64_t batch, const TileRows& rows,
                          Span keys, const float* HWY_RESTRICT tile) {
  auto* data = static_cast<float*>(view.data);
  for (std::int64_t lane = 0; lane < rows.count; ++lane) {
    const auto i = static_cast<std::size_t>(lane);
    float* to = data + pair_offset(view, batch, rows.head[i], rows.query[i]);
    for (std::int64_t k = 0; k < keys.size(); ++k) {
      to[(keys.begin + k) * view.strides[3]] += tile[k * kTileLanes + lane];
    }
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_PAIR_TILE_INL
