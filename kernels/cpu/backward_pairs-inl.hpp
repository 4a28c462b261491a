// The products of the backward pass in bf16 through the dot product of vectors. P and dS are
// rounded to bf16 for it.
#if defined(ANNULUS_CPU_BACKWARD_PAIRS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_BACKWARD_PAIRS_INL
#undef ANNULUS_CPU_BACKWARD_PAIRS_INL
#else
#define ANNULUS_CPU_BACKWARD_PAIRS_INL
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/attention.hpp"
#include "kernels/cpu/backward_panels-inl.hpp"
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/pair_products-inl.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/cpu/scratch.hpp"

#if ANNULUS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// K and V of a chunk of keys, Q and dO of a tile of queries: pairs of columns for P and dP, of
/// rows for the gradients.
class BackwardPairs {
 public:
  BackwardPairs(const AttentionProblem& problem, std::int64_t chunk_keys, Scratch& scratch)
      : head_dim_(problem.head_dim()),
        value_dim_(problem.value_dim()),
        chunk_keys_(chunk_keys),
        stride_(tile_stride(std::max(head_dim_, value_dim_))),
        k_(scratch.take(chunk_keys * head_dim_ / 2)),
        v_(scratch.take(chunk_keys * value_dim_ / 2)),
        q_(scratch.take(depth(head_dim_) / 2 * kTileLanes)),
        grad_o_(scratch.take(depth(value_dim_) / 2 * kTileLanes)),
        rows_(scratch.take(kTileLanes * stride_)),
        k_columns_(scratch.take(chunk_keys * head_dim_ / 2)),
        q_rows_(scratch.take(kTileLanes / 2 * stride_)),
        grad_o_rows_(scratch.take(kTileLanes / 2 * stride_)),
        weights_(scratch.take((kKeyTile + 8) * kTileLanes)) {}

  static std::int64_t floats(const AttentionProblem& problem, std::int64_t chunk_keys) {
    const std::int64_t head_dim = problem.head_dim();
    const std::int64_t value_dim = problem.value_dim();
    const std::int64_t stride = tile_stride(std::max(head_dim, value_dim));
    return 2 * Scratch::room_for(chunk_keys * head_dim / 2) +
           Scratch::room_for(chunk_keys * value_dim / 2) +
           Scratch::room_for(depth(head_dim) / 2 * kTileLanes) +
           Scratch::room_for(depth(value_dim) / 2 * kTileLanes) +
           Scratch::room_for(kTileLanes * stride) + 2 * Scratch::room_for(kTileLanes / 2 * stride) +
           Scratch::room_for((kKeyTile + 8) * kTileLanes);
  }

  /// K and V in panels of eight keys, [keys / 8, dim / 2, 8], and K in panels of its columns,
  /// [head_dim / 8, keys / 2, 8]; zeros beyond the last key.
  void load_keys(const AttentionProblem& problem, const RowBlock& block) {
    for (std::int64_t first = 0; first < block.keys.size(); first += 8) {
      load_panel(problem.k, block, first, k_ + first * head_dim_ / 2);
      MagnitudeOfPairs ignored;
      for (std::int64_t i = 0; i < 8; i += 2) {
        pair_rows(reinterpret_cast<const std::uint16_t*>(rows_ + i * stride_),
                  reinterpret_cast<const std::uint16_t*>(rows_ + (i + 1) * stride_), head_dim_,
                  chunk_keys_ / 2, (first + i) / 2, k_columns_, ignored);
      }
      load_panel(problem.v, block, first, v_ + first * value_dim_ / 2);
    }
  }

  /// From rows in f32 [lanes, stride] that hold bf16 values, `count` of which are queries. K·Qᵀ is
  /// wanted with Q negated where the scale is negative.
  void load_queries(const float* query_rows, std::int64_t q_stride, const float* gradient_rows,
                    std::int64_t grad_o_stride, std::int64_t count, bool negate) {
    store_row_pairs(query_rows, q_stride, count, head_dim_, q_rows_);
    store_row_pairs(gradient_rows, grad_o_stride, count, value_dim_, grad_o_rows_);
    lane_pairs_ = (count + 1) / 2;
    store_right_columns(query_rows, q_stride, depth(head_dim_), head_dim_, negate ? 0x80000000U : 0,
                        rows_, q_);
    store_right_columns(gradient_rows, grad_o_stride, depth(value_dim_), value_dim_, 0, rows_,
                        grad_o_);
  }

  /// K·Qᵀ and V·dOᵀ for whole panels of keys, [keys, lanes].
  void multiply(std::int64_t vectors, std::int64_t first, std::int64_t keys, float* p, float* dp,
                RowPrefetch* prefetch) const {
    gemm<Update::overwrite, Layout::panels, Elements::bf16_pairs>(
        {keys, vectors, head_dim_ / 2}, {k_ + first * head_dim_ / 2, 4 * head_dim_}, q_, kTileLanes,
        p, kTileLanes, nullptr, prefetch);
    gemm<Update::overwrite, Layout::panels, Elements::bf16_pairs>(
        {keys, vectors, value_dim_ / 2}, {v_ + first * value_dim_ / 2, 4 * value_dim_}, grad_o_,
        kTileLanes, dp, kTileLanes, nullptr, prefetch);
  }

  /// dV += P·dO, dK += dS·Q and dQᵀ += Kᵀ·dSᵀ for `keys` keys from the chunk's `first` on, both
  /// multiples of 8; weights [keys, lanes], 0 for keys outside a run.
  void add_gradients(std::int64_t vectors, std::int64_t first, std::int64_t keys, const float* p,
                     const float* ds, const BackwardSums& sums, RowPrefetch* prefetch) {
    add_to_keys(keys, p, grad_o_rows_, value_dim_, sums.dv + first * sums.v_stride, sums.v_stride,
                prefetch);
    add_to_keys(keys, ds, q_rows_, head_dim_, sums.dk + first * sums.k_stride, sums.k_stride,
                prefetch);
    if (sums.dq == nullptr) return;
    store_pairs(keys, vectors, ds, reinterpret_cast<std::uint32_t*>(weights_));
    gemm<Update::add, Layout::panels, Elements::bf16_pairs>(
        {head_dim_, vectors, keys / 2}, {k_columns_ + first / 2 * 8, 4 * chunk_keys_}, weights_,
        kTileLanes, sums.dq, kTileLanes, nullptr, prefetch);
  }

 private:
  // Rows 2i and 2i + 1 of `count` as row i, [lanes / 2, stride_] pairs in whole vectors.
  void store_row_pairs(const float* rows, std::int64_t stride, std::int64_t count,
                       std::int64_t columns, float* to) const {
    for (std::int64_t row = 0; row < count; row += 2) {
      for (std::int64_t c = 0; c < columns; c += kLanes) {
        const float* at = rows + row * stride + c;
        const __m512 upper = row + 1 < count ? _mm512_loadu_ps(at + stride) : _mm512_setzero_ps();
        _mm512_storeu_si512(to + row / 2 * stride_ + c, pair_of(_mm512_loadu_ps(at), upper));
      }
    }
  }

  // to[key, column] += weights·rows over pairs of lanes.
  void add_to_keys(std::int64_t keys, const float* weights, const float* rows, std::int64_t dim,
                   float* to, std::int64_t stride, RowPrefetch* prefetch) {
    for (std::int64_t key = 0; key < keys; ++key) {
      const float* from = weights + key * kTileLanes;
      float* pairs = weights_ + key * kTileLanes;
      _mm512_storeu_si512(pairs, halves_of(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)));
      _mm512_storeu_si512(pairs + 16, halves_of(_mm512_loadu_ps(from + 32), _mm512_setzero_ps()));
    }
    gemm<Update::add, Layout::tile, Elements::bf16_pairs>(
        {keys, (dim + kLanes - 1) / kLanes, lane_pairs_}, tile_rows(weights_), rows, stride_, to,
        stride, nullptr, prefetch);
  }

  static std::int64_t depth(std::int64_t dim) { return round_up(dim, kAmxDepth); }

  void load_panel(const ConstTensorView& view, const RowBlock& block, std::int64_t first,
                  float* panel) const {
    const std::int64_t count = std::min<std::int64_t>(8, block.keys.size() - first);
    for (std::int64_t i = 0; i < count; ++i) {
      std::memcpy(rows_ + i * stride_,
                  static_cast<const std::uint16_t*>(view.data) +
                      row_offset(view, block.batch, block.keys.begin + first + i, block.kv_head),
                  static_cast<std::size_t>(view.shape[3]) * sizeof(std::uint16_t));
    }
    std::fill_n(rows_ + count * stride_, (8 - count) * stride_, 0.0F);
    transpose(rows_, stride_, 8, view.shape[3] / 2, panel, 8);
  }

  std::int64_t head_dim_;
  std::int64_t value_dim_;
  std::int64_t chunk_keys_;
  std::int64_t stride_;
  std::int64_t lane_pairs_ = 0;  // of the tile's queries
  float* k_;                     // [keys / 8, head_dim / 2, 8] pairs
  float* v_;                     // [keys / 8, value_dim / 2, 8] pairs
  float* q_;                     // [head_dim / 2, lanes] pairs
  float* grad_o_;                // [value_dim / 2, lanes] pairs
  float* rows_;                  // [lanes, stride]
  float* k_columns_;             // [head_dim / 8, keys / 2, 8] pairs
  float* q_rows_;                // [lanes / 2, stride] pairs
  float* grad_o_rows_;           // [lanes / 2, stride] pairs
  float* weights_;  // [keys, lanes / 2] pairs a tile's lanes apart, or [keys / 2, lanes]
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_PAIRS

#endif  // ANNULUS_CPU_BACKWARD_PAIRS_INL
