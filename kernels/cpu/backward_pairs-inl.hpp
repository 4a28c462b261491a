// The products of the backward pass whose operands are bf16 already, K·Qᵀ and V·dOᵀ, through the
// dot product of vectors.
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
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/pair_products-inl.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/cpu/scratch.hpp"

#if ANNULUS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// K and V of a chunk of keys, Q and dO of a tile of queries, all as pairs of columns.
class BackwardPairs {
 public:
  BackwardPairs(const AttentionProblem& problem, std::int64_t chunk_keys, Scratch& scratch)
      : head_dim_(problem.head_dim()),
        value_dim_(problem.value_dim()),
        stride_(tile_stride(std::max(head_dim_, value_dim_))),
        k_(scratch.take(chunk_keys * head_dim_ / 2)),
        v_(scratch.take(chunk_keys * value_dim_ / 2)),
        q_(scratch.take(depth(head_dim_) / 2 * kTileLanes)),
        grad_o_(scratch.take(depth(value_dim_) / 2 * kTileLanes)),
        rows_(scratch.take(kTileLanes * stride_)) {}

  static std::int64_t floats(const AttentionProblem& problem, std::int64_t chunk_keys) {
    const std::int64_t head_dim = problem.head_dim();
    const std::int64_t value_dim = problem.value_dim();
    return Scratch::room_for(chunk_keys * head_dim / 2) +
           Scratch::room_for(chunk_keys * value_dim / 2) +
           Scratch::room_for(depth(head_dim) / 2 * kTileLanes) +
           Scratch::room_for(depth(value_dim) / 2 * kTileLanes) +
           Scratch::room_for(kTileLanes * tile_stride(std::max(head_dim, value_dim)));
  }

  /// Panels of eight keys, [keys / 8, dim / 2, 8]; zeros beyond the last.
  void load_keys(const AttentionProblem& problem, const RowBlock& block) {
    for (std::int64_t first = 0; first < block.keys.size(); first += 8) {
      load_panel(problem.k, block, first, k_ + first * head_dim_ / 2);
      load_panel(problem.v, block, first, v_ + first * value_dim_ / 2);
    }
  }

  /// From rows in f32 [lanes, stride] that hold bf16 values. K·Qᵀ is wanted with Q negated where
  /// the scale is negative.
  void load_queries(const float* query_rows, std::int64_t q_stride, const float* gradient_rows,
                    std::int64_t grad_o_stride, bool negate) {
    store_right_columns(query_rows, q_stride, depth(head_dim_), head_dim_, negate ? 0x80000000U : 0,
                        rows_, q_);
    store_right_columns(gradient_rows, grad_o_stride, depth(value_dim_), value_dim_, 0, rows_,
                        grad_o_);
  }

  /// K·Qᵀ and V·dOᵀ for whole panels of keys, [keys, lanes].
  void multiply(std::int64_t vectors, std::int64_t first, std::int64_t keys, float* p, float* dp,
                RowPrefetch& prefetch) const {
    gemm<Update::overwrite, Layout::panels, Elements::bf16_pairs>(
        {keys, vectors, head_dim_ / 2}, {k_ + first * head_dim_ / 2, 4 * head_dim_}, q_, kTileLanes,
        p, kTileLanes, nullptr, &prefetch);
    gemm<Update::overwrite, Layout::panels, Elements::bf16_pairs>(
        {keys, vectors, value_dim_ / 2}, {v_ + first * value_dim_ / 2, 4 * value_dim_}, grad_o_,
        kTileLanes, dp, kTileLanes, nullptr, &prefetch);
  }

 private:
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
  std::int64_t stride_;
  float* k_;       // [keys / 8, head_dim / 2, 8] pairs
  float* v_;       // [keys / 8, value_dim / 2, 8] pairs
  float* q_;       // [head_dim / 2, lanes] pairs
  float* grad_o_;  // [value_dim / 2, lanes] pairs
  float* rows_;    // [lanes, stride]
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_PAIRS

#endif  // ANNULUS_CPU_BACKWARD_PAIRS_INL
