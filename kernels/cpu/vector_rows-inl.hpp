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
        rows_(scratch.take(kMostRows * stride_)) {}

  static std::int64_t scratch_floats(const AttentionProblem& problem, std::int64_t chunk_keys) {
    const std::int64_t stride = tile_stride(std::max(problem.head_dim(), problem.value_dim()));
    return Scratch::room_for(chunk_keys * problem.head_dim()) +
           Scratch::room_for(chunk_keys * problem.value_dim()) +
           Scratch::room_for(kMostRows * stride);
  }

  /// Q as [head_dim, lanes].
  void load_queries(QueryTile& tile) {
    for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      float* row = rows_ + lane * stride_;
      load_row(problem_.q.data, problem_.q.dtype,
               row_offset(problem_.q, block_.rows.batch, tile.rows.query[i], tile.rows.head[i]),
               head_dim_, row);
      if (problem_.scale < 0.0F) {
        for (std::int64_t d = 0; d < head_dim_; ++d) row[d] = -row[d];
      }
    }
    transpose(rows_, stride_, kTileLanes, head_dim_, tile.q, kTileLanes);
  }

  /// K of a tile in panels of keys, [keys / 8, head_dim, 8]; V in panels of its columns,
  /// [value_dim / 8, keys, 8]. Keys beyond the last are zeros.
  void pack(Span keys, std::size_t index) {
    float* k = k_of(index);
    float* v = v_of(index);
    bool finite = true;
    for (std::int64_t first = 0; first < kKeyTile; first += 8) {
      load_keys(problem_.k, keys, keys.begin + first);
      transpose(rows_, stride_, 8, head_dim_, k + first * head_dim_, 8);
      load_keys(problem_.v, keys, keys.begin + first);
      for (std::int64_t i = 0; i < 8; ++i) {
        finite = finite && all_finite(rows_ + i * stride_, value_dim_);
      }
      // A panel's eight rows in turn: stores a page apart would share one set of the cache.
      for (std::int64_t c = 0; c < value_dim_; c += 8) {
        float* panel = v + c * kKeyTile + first * 8;
        for (std::int64_t i = 0; i < 8; ++i)
          load_row_f32(rows_ + i * stride_ + c, 8, panel + i * 8);
      }
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
  static constexpr std::int64_t kMostRows = kTileLanes > 8 ? kTileLanes : 8;

  float* k_of(std::size_t index) const {
    return k_ + static_cast<std::int64_t>(index) * kKeyTile * head_dim_;
  }
  float* v_of(std::size_t index) const {
    return v_ + static_cast<std::int64_t>(index) * kKeyTile * value_dim_;
  }

  // Eight rows from `key` on, zeros beyond the last.
  void load_keys(const ConstTensorView& view, Span keys, std::int64_t key) const {
    for (std::int64_t i = 0; i < 8; ++i) {
      float* row = rows_ + i * stride_;
      if (key + i < keys.end) {
        load_key_row(view, block_.rows, keys, key + i, row);
      } else {
        std::fill_n(row, view.shape[3], 0.0F);
      }
    }
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
  float* rows_;               // [lanes, stride]
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_VECTOR_ROWS_INL
