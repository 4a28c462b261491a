// The forward pass of bf16 through the dot product of vectors: tiles as in f32, with half as many
// steps, each a pair of bf16.
#if defined(ANNULUS_CPU_DOT_ROWS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_DOT_ROWS_INL
#undef ANNULUS_CPU_DOT_ROWS_INL
#else
#define ANNULUS_CPU_DOT_ROWS_INL
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/forward_rows.hpp"
#include "kernels/cpu/logits_tile-inl.hpp"
#include "kernels/cpu/pair_products-inl.hpp"
#include "kernels/cpu/query_tile-inl.hpp"
#include "kernels/cpu/run_products-inl.hpp"

#if ANNULUS_PAIRS
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// K and V of a chunk of keys as pairs, of columns of K and of keys of V, and what tiles of queries
/// do with them.
class DotRows {
 public:
  DotRows(const AttentionProblem& problem, const ForwardBlock& block, std::int64_t chunk_keys,
          Scratch& scratch, const TileWork& work)
      : problem_(problem),
        block_(block),
        work_(work),
        head_dim_(problem.head_dim()),
        value_dim_(problem.value_dim()),
        stride_(tile_stride(std::max(head_dim_, value_dim_))),
        finite_(static_cast<std::size_t>(chunk_keys / kKeyTile)) {
    k_ = scratch.take(chunk_keys * head_dim_ / 2);
    v_ = scratch.take(chunk_keys * value_dim_ / 2);
    weights_ = scratch.take(kKeyTile / 2 * kTileLanes);
    rows_ = scratch.take(stride_);
    values_ = scratch.take(kKeyTile * value_dim_);
  }

  static std::int64_t scratch_floats(const AttentionProblem& problem, std::int64_t chunk_keys) {
    const std::int64_t dims = problem.head_dim() + problem.value_dim();
    return chunk_keys * dims / 2 + kKeyTile / 2 * kTileLanes +
           tile_stride(std::max(problem.head_dim(), problem.value_dim())) +
           kKeyTile * problem.value_dim() + 5 * 32;
  }

  /// Q as pairs of columns, [head_dim / 2, lanes].
  void load_queries(QueryTile& tile) {
    for (std::int64_t first = 0; first < kTileLanes; first += kRowsTogether) {
      RowPointers rows{};
      for (std::int64_t i = 0; i < kRowsTogether; ++i) {
        const auto lane = static_cast<std::size_t>(first + i);
        rows[static_cast<std::size_t>(i)] = pairs_at(
            problem_.q,
            row_offset(problem_.q, block_.rows.batch, tile.rows.query[lane], tile.rows.head[lane]));
      }
      transpose_rows(rows, kRowsTogether, head_dim_ / 2, tile.q + first, kTileLanes);
    }
    if (problem_.scale < 0.0F) flip_signs(head_dim_ / 2 * kTileLanes, tile.q);
  }

  /// K of a tile in panels of keys, [keys / 8, head_dim / 2, 8] pairs; V in panels of its columns,
  /// [value_dim / 8, keys / 2, 8]. Keys beyond the last are zeros.
  void pack(Span keys, std::size_t index) {
    MagnitudeOfPairs magnitude;
    for (std::int64_t first = 0; first < kKeyTile; first += 8) {
      transpose_rows(eight_keys(problem_.k, keys, first), 8, head_dim_ / 2,
                     k_of(index) + first * head_dim_ / 2, 8);
      const RowPointers rows = eight_keys(problem_.v, keys, first);
      for (std::size_t i = 0; i < 8; i += 2) {
        pair_rows(reinterpret_cast<const std::uint16_t*>(rows[i]),
                  reinterpret_cast<const std::uint16_t*>(rows[i + 1]), value_dim_, kKeyTile / 2,
                  (first + static_cast<std::int64_t>(i)) / 2, v_of(index), magnitude);
      }
    }
    finite_[index] = magnitude.finite();
  }

  /// One tile of Sᵀ = K·Qᵀ, its softmax, and Oᵀ = Oᵀ·rescale + Vᵀ·Pᵀ, for whole panels of eight
  /// keys around the run; weights outside it are 0.
  void add_run(QueryTile& tile, const KeyRun& run, std::int64_t first_key, std::size_t index) {
    const RunPanels panels(tile, run, first_key);
    const std::int64_t keys = run.keys.size();
    const std::int64_t first = first_key - panels.before();
    panels.multiply_queries<Elements::bf16_pairs>(
        head_dim_ / 2, k_of(index) + first * head_dim_ / 2, tile.q, work_.p, work_.prefetch);
    float* p = work_.p + panels.before() * kTileLanes;
    products_to_logits({problem_, block_.rows.batch, tile.rows, tile.vectors, run, panels.edges()},
                       work_.buffers, p);
    const float factor = logit_factor(problem_);
    const bool dropout = problem_.dropout.probability > 0.0F;
    const bool masked = !run.full || problem_.dense_mask || panels.all() != keys;
    if (dropout || (masked && !finite_[index])) {
      softmax_tile(keys, tile.vectors, factor, p, tile.state, work_.rescale);
      drop_weights(problem_, block_.rows.batch, tile, run, work_.buffers, p);
      if (masked && !finite_[index]) {
        load_values(run.keys);
        return add_kept_values(tile, value_dim_, keys, values_, p, work_.rescale);
      }
      panels.fill_outside(keys, 0.0F, work_.p);
      store_pairs(panels.all(), tile.vectors, work_.p, pairs());
    } else {
      panels.fill_outside(keys, kMinusInfinity, work_.p);
      softmax_pairs(panels.all(), tile.vectors, factor, work_.p, tile.state, work_.rescale,
                    pairs());
    }
    panels.add_values<Elements::bf16_pairs>(value_dim_, v_of(index) + first / 2 * 8,
                                            8 * kKeyTile / 2, weights_, tile.o, work_.rescale,
                                            work_.prefetch);
  }

 private:
  float* k_of(std::size_t index) const {
    return k_ + static_cast<std::int64_t>(index) * kKeyTile * head_dim_ / 2;
  }
  float* v_of(std::size_t index) const {
    return v_ + static_cast<std::int64_t>(index) * kKeyTile * value_dim_ / 2;
  }
  std::uint32_t* pairs() const { return reinterpret_cast<std::uint32_t*>(weights_); }

  // A row of bf16 as pairs in the bits of floats, to be read by vectors alone.
  static const float* pairs_at(const ConstTensorView& view, std::int64_t at) {
    return reinterpret_cast<const float*>(static_cast<const std::uint16_t*>(view.data) + at);
  }

  // Eight rows from the `first` of a tile on, zeros beyond the last.
  RowPointers eight_keys(const ConstTensorView& view, Span keys, std::int64_t first) const {
    RowPointers rows{};
    if (keys.begin + first + 8 > keys.end) std::fill_n(rows_, view.shape[3] / 2, 0.0F);
    for (std::int64_t i = 0; i < 8; ++i) {
      const std::int64_t key = keys.begin + first + i;
      const std::int64_t at = row_offset(view, block_.rows.batch, key, block_.rows.kv_head);
      if (key + kRowsAhead < keys.end) prefetch_row(view, at + kRowsAhead * view.strides[1]);
      rows[static_cast<std::size_t>(i)] = key < keys.end ? pairs_at(view, at) : rows_;
    }
    return rows;
  }

  // V of some keys in f32, in panels of its columns from the first of them on.
  void load_values(Span keys) {
    for (std::int64_t key = keys.begin; key < keys.end; ++key) {
      load_row(problem_.v.data, problem_.v.dtype,
               row_offset(problem_.v, block_.rows.batch, key, block_.rows.kv_head), value_dim_,
               rows_);
      store_in_panels(rows_, value_dim_, kKeyTile, key - keys.begin, values_);
    }
  }

  const AttentionProblem& problem_;
  const ForwardBlock& block_;
  TileWork work_;
  std::int64_t head_dim_;
  std::int64_t value_dim_;
  std::int64_t stride_;
  std::vector<bool> finite_;  // whether V of a key tile is
  float* k_ = nullptr;        // [key tiles, keys / 8, head_dim / 2, 8] pairs
  float* v_ = nullptr;        // [key tiles, value_dim / 8, keys / 2, 8] pairs
  float* weights_ = nullptr;  // [keys / 2, lanes] pairs
  float* rows_ = nullptr;     // [stride]
  float* values_ = nullptr;   // [value_dim / 8, keys, 8]
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_PAIRS

#endif  // ANNULUS_CPU_DOT_ROWS_INL
