// The forward pass by vector multiply-adds in f32, whatever the type of the rows.
#if defined(ANNULUS_CPU_VECTOR_ROWS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_VECTOR_ROWS_INL
#undef ANNULUS_CPU_VECTOR_ROWS_INL
#else
#define ANNULUS_CPU_VECTOR_ROWS_INL
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/forward_rows.hpp"
#include "kernels/cpu/logits_tile-inl.hpp"
#include "kernels/cpu/query_tile-inl.hpp"
#include "kernels/cpu/run_products-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// K and V of a chunk of keys in panels of f32, and what tiles of queries do with them.
class VectorRows {
 public:
  VectorRows(const AttentionProblem& problem, const ForwardBlock& block, std::int64_t chunk_keys,
             Scratch& scratch, const TileWork& work)
      : problem_(problem),
        block_(block),
        work_(work),
        head_dim_(problem.head_dim()),
        value_dim_(problem.value_dim()),
        stride_(tile_stride(std::max(head_dim_, value_dim_))),
        finite_(static_cast<std::size_t>(chunk_keys / kKeyTile)),
        k_(scratch.take(chunk_keys * head_dim_)),
        v_(scratch.take(chunk_keys * value_dim_)),
        rows_(scratch.take(kRowsTogether * stride_)) {}

  static std::int64_t scratch_floats(const AttentionProblem& problem, std::int64_t chunk_keys) {
    const std::int64_t stride = tile_stride(std::max(problem.head_dim(), problem.value_dim()));
    return Scratch::room_for(chunk_keys * problem.head_dim()) +
           Scratch::room_for(chunk_keys * problem.value_dim()) +
           Scratch::room_for(kRowsTogether * stride);
  }

  /// Q as [head_dim, lanes].
  void load_queries(QueryTile& tile) {
    for (std::int64_t first = 0; first < kTileLanes; first += kRowsTogether) {
      const std::int64_t count = std::min(kRowsTogether, kTileLanes - first);
      RowPointers rows{};
      for (std::int64_t i = 0; i < count; ++i) {
        const auto lane = static_cast<std::size_t>(first + i);
        rows[static_cast<std::size_t>(i)] = row_of(
            problem_.q,
            row_offset(problem_.q, block_.rows.batch, tile.rows.query[lane], tile.rows.head[lane]),
            rows_ + i * stride_);
      }
      transpose_rows(rows, count, head_dim_, tile.q + first, kTileLanes);
    }
    if (problem_.scale >= 0.0F) return;
    for (std::int64_t i = 0; i < head_dim_ * kTileLanes; ++i) tile.q[i] = -tile.q[i];
  }

  /// K of a tile in panels of keys, [keys / 8, head_dim, 8]; V in panels of its columns,
  /// [value_dim / 8, keys, 8]. Keys beyond the last are zeros.
  void pack(Span keys, std::size_t index) {
    bool finite = true;
    for (std::int64_t first = 0; first < kKeyTile; first += 8) {
      transpose_rows(eight_keys(problem_.k, keys, first), 8, head_dim_,
                     k_of(index) + first * head_dim_, 8);
      finite &= store_eight_in_panels(eight_keys(problem_.v, keys, first), value_dim_, kKeyTile,
                                      first, v_of(index));
    }
    finite_[index] = finite;
  }

  /// One tile of Sᵀ = K·Qᵀ, its softmax, and Oᵀ = Oᵀ·rescale + Vᵀ·Pᵀ, for whole panels of eight
  /// keys around the run; weights outside it are 0.
  void add_run(QueryTile& tile, const KeyRun& run, std::int64_t first_key, std::size_t index) {
    const RunPanels panels(tile, run, first_key);
    const std::int64_t keys = run.keys.size();
    const std::int64_t first = first_key - panels.before();
    panels.multiply_queries<Elements::f32>(head_dim_, k_of(index) + first * head_dim_, tile.q,
                                           work_.p, work_.prefetch);
    float* p = work_.p + panels.before() * kTileLanes;
    products_to_logits({problem_, block_.rows.batch, tile.rows, tile.vectors, run, panels.edges()},
                       work_.buffers, p);
    softmax_tile(keys, tile.vectors, logit_factor(problem_), p, tile.state, work_.rescale);
    drop_weights(problem_, block_.rows.batch, tile, run, work_.buffers, p);
    const float* v = v_of(index);
    const bool masked = !run.full || problem_.dense_mask || panels.all() != keys;
    if (masked && !finite_[index]) {
      return add_kept_values(tile, value_dim_, keys, v + first_key * 8, p, work_.rescale);
    }
    panels.fill_outside(keys, 0.0F, work_.p);
    panels.add_values<Elements::f32>(value_dim_, v + first * 8, 8 * kKeyTile, work_.p, tile.o,
                                     work_.rescale, work_.prefetch);
  }

 private:
  float* k_of(std::size_t index) const {
    return k_ + static_cast<std::int64_t>(index) * kKeyTile * head_dim_;
  }
  float* v_of(std::size_t index) const {
    return v_ + static_cast<std::int64_t>(index) * kKeyTile * value_dim_;
  }

  // A row in f32: where it lies, or converted.
  static const float* row_of(const ConstTensorView& view, std::int64_t at, float* converted) {
    if (view.dtype == DType::f32) return static_cast<const float*>(view.data) + at;
    load_row(view.data, view.dtype, at, view.shape[3], converted);
    return converted;
  }

  // Eight rows from the `first` of a tile on, zeros beyond the last.
  RowPointers eight_keys(const ConstTensorView& view, Span keys, std::int64_t first) const {
    RowPointers rows{};
    for (std::int64_t i = 0; i < 8; ++i) {
      const std::int64_t key = keys.begin + first + i;
      float* row = rows_ + i * stride_;
      if (key >= keys.end) {
        std::fill_n(row, view.shape[3], 0.0F);
        rows[static_cast<std::size_t>(i)] = row;
        continue;
      }
      const std::int64_t at = row_offset(view, block_.rows.batch, key, block_.rows.kv_head);
      if (key + kRowsAhead < keys.end) prefetch_row(view, at + kRowsAhead * view.strides[1]);
      rows[static_cast<std::size_t>(i)] = row_of(view, at, row);
    }
    return rows;
  }

  const AttentionProblem& problem_;
  const ForwardBlock& block_;
  TileWork work_;
  std::int64_t head_dim_;
  std::int64_t value_dim_;
  std::int64_t stride_;
  std::vector<bool> finite_;  // whether V of a key tile is
  float* k_;                  // [key tiles, keys / 8, head_dim, 8]
  float* v_;                  // [key tiles, value_dim / 8, keys, 8]
  float* rows_;               // [kRowsTogether, stride]
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_VECTOR_ROWS_INL
