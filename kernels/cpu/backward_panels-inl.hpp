// The products of the backward pass by vectors in f32, and those of any kind that leave terms out.
#if defined(ANNULUS_CPU_BACKWARD_PANELS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_BACKWARD_PANELS_INL
#undef ANNULUS_CPU_BACKWARD_PANELS_INL
#else
#define ANNULUS_CPU_BACKWARD_PANELS_INL
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/attention.hpp"
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/cpu/gradient_tile-inl.hpp"
#include "kernels/cpu/logits_tile-inl.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/cpu/scratch.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Q and dO of a tile of queries, [kTileLanes, stride], zeros beyond their columns.
struct QueryRows {
  const float* q = nullptr;
  const float* grad_o = nullptr;
  std::int64_t q_stride = 0;
  std::int64_t grad_o_stride = 0;
};

/// What the products of a tile add to: dQᵀ [head_dim, lanes], rows of dK and dV from a chunk's
/// first key on.
struct BackwardSums {
  float* dq = nullptr;  // or nobody asks for it
  float* dk = nullptr;
  float* dv = nullptr;
  std::int64_t k_stride = 0;
  std::int64_t v_stride = 0;
};

/// K and V of a chunk of keys in panels of eight, Q and dO of a tile of queries by columns.
class BackwardPanels {
 public:
  BackwardPanels(const AttentionProblem& problem, std::int64_t chunk_keys, Scratch& scratch)
      : problem_(problem),
        head_dim_(problem.head_dim()),
        value_dim_(problem.value_dim()),
        chunk_keys_(chunk_keys),
        stride_(tile_stride(std::max(head_dim_, value_dim_))),
        k_(scratch.take(chunk_keys * head_dim_)),
        k_columns_(scratch.take(chunk_keys * head_dim_)),
        v_(scratch.take(chunk_keys * value_dim_)),
        rows_(scratch.take(8 * stride_)),
        q_(scratch.take(head_dim_ * kTileLanes)),
        grad_o_(scratch.take(value_dim_ * kTileLanes)) {}

  static std::int64_t floats(const AttentionProblem& problem, std::int64_t chunk_keys) {
    const std::int64_t head_dim = problem.head_dim();
    const std::int64_t value_dim = problem.value_dim();
    return 2 * Scratch::room_for(chunk_keys * head_dim) +
           Scratch::room_for(chunk_keys * value_dim) +
           Scratch::room_for(8 * tile_stride(std::max(head_dim, value_dim))) +
           Scratch::room_for(head_dim * kTileLanes) + Scratch::room_for(value_dim * kTileLanes);
  }

  /// All operands of multiply() and add_gradients(), or K, which is enough for add_kept().
  enum class Kept : std::uint8_t { all, k };

  void load_keys(const RowBlock& block, Kept kept) {
    for (std::int64_t first = 0; first < block.keys.size(); first += 8) {
      const std::int64_t count = std::min<std::int64_t>(8, block.keys.size() - first);
      load_panel(problem_.k, block, first, count, k_ + first * head_dim_);
      if (kept == Kept::k) continue;
      for (std::int64_t i = 0; i < count; ++i) {
        store_in_panels(rows_ + i * stride_, head_dim_, chunk_keys_, first + i, k_columns_);
      }
      load_panel(problem_.v, block, first, count, v_ + first * value_dim_);
    }
  }

  /// K·Qᵀ is wanted with Q negated where the scale is negative.
  void load_queries(const QueryRows& rows) {
    transpose(rows.q, rows.q_stride, kTileLanes, head_dim_, q_, kTileLanes);
    transpose(rows.grad_o, rows.grad_o_stride, kTileLanes, value_dim_, grad_o_, kTileLanes);
    if (problem_.scale >= 0.0F) return;
    for (std::int64_t i = 0; i < head_dim_ * kTileLanes; ++i) q_[i] = -q_[i];
  }

  /// K·Qᵀ and V·dOᵀ for whole panels of keys, [keys, lanes].
  void multiply(std::int64_t vectors, std::int64_t first, std::int64_t keys, float* p, float* dp,
                RowPrefetch* prefetch) const {
    gemm<Update::overwrite, Layout::panels>({keys, vectors, head_dim_},
                                            {k_ + first * head_dim_, 8 * head_dim_}, q_, kTileLanes,
                                            p, kTileLanes, nullptr, prefetch);
    gemm<Update::overwrite, Layout::panels>({keys, vectors, value_dim_},
                                            {v_ + first * value_dim_, 8 * value_dim_}, grad_o_,
                                            kTileLanes, dp, kTileLanes, nullptr, prefetch);
  }

  /// dV += P·dO, dK += dS·Q, dQᵀ += Kᵀ·dSᵀ for the tile's run of keys, from the chunk's `first` on.
  /// The first two write whole panels of keys: the rows beyond the run add zeros to their
  /// neighbours.
  void add_gradients(const LogitsTile& tile, std::int64_t first, float* p, float* ds,
                     const QueryRows& rows, const BackwardSums& sums) const {
    const std::int64_t keys = tile.run.keys.size();
    const std::int64_t panels = round_up(keys, 8);
    std::fill_n(p + keys * kTileLanes, (panels - keys) * kTileLanes, 0.0F);
    std::fill_n(ds + keys * kTileLanes, (panels - keys) * kTileLanes, 0.0F);
    const std::int64_t k_vectors = (head_dim_ + kLanes - 1) / kLanes;
    const std::int64_t v_vectors = (value_dim_ + kLanes - 1) / kLanes;
    gemm<Update::add, Layout::tile>({panels, v_vectors, tile.rows.count}, tile_rows(p), rows.grad_o,
                                    rows.grad_o_stride, sums.dv + first * sums.v_stride,
                                    sums.v_stride);
    gemm<Update::add, Layout::tile>({panels, k_vectors, tile.rows.count}, tile_rows(ds), rows.q,
                                    rows.q_stride, sums.dk + first * sums.k_stride, sums.k_stride);
    if (sums.dq == nullptr) return;
    gemm<Update::add, Layout::panels>({head_dim_, tile.vectors, keys},
                                      {k_columns_ + first * 8, 8 * chunk_keys_}, ds, kTileLanes,
                                      sums.dq, kTileLanes);
  }

  /// Whether all right operands of dV, dK and dQ are, for `keys` keys from `first` on.
  bool finite(const QueryRows& rows, std::int64_t first, std::int64_t keys) const {
    return all_finite(rows.grad_o, kTileLanes * rows.grad_o_stride) &&
           all_finite(rows.q, kTileLanes * rows.q_stride) &&
           all_finite(k_ + first * head_dim_, keys * head_dim_);
  }

  /// The sums of add_gradients(), bit for bit, without the terms of weight 0, which a mask may have
  /// dropped.
  void add_kept(const LogitsTile& tile, std::int64_t first, const float* p, const float* ds,
                const QueryRows& rows, const BackwardSums& sums) const {
    const std::int64_t keys = tile.run.keys.size();
    for (std::int64_t i = 0; i < keys; ++i) {
      add_kept_rows(tile.rows.count, p + i * kTileLanes, rows.grad_o, rows.grad_o_stride,
                    value_dim_, sums.dv + (first + i) * sums.v_stride);
      add_kept_rows(tile.rows.count, ds + i * kTileLanes, rows.q, rows.q_stride, head_dim_,
                    sums.dk + (first + i) * sums.k_stride);
    }
    if (sums.dq == nullptr) return;
    const Floats d;
    for_each_vector(head_dim_, tile.vectors, sums.dq,
                    [&](std::int64_t column, std::int64_t v, float* at) HWY_ATTR {
                      FloatVec sum = hn::Zero(d);
                      for (std::int64_t i = 0; i < keys; ++i) {
                        const FloatVec weight = hn::Load(d, ds + i * kTileLanes + v * kLanes);
                        const float k =
                            k_[(first + i) / 8 * 8 * head_dim_ + column * 8 + (first + i) % 8];
                        sum = hn::IfThenElse(hn::Eq(weight, hn::Zero(d)), sum,
                                             hn::MulAdd(hn::Set(d, k), weight, sum));
                      }
                      hn::Store(hn::Add(hn::Load(d, at), sum), d, at);
                    });
  }

 private:
  void load_panel(const ConstTensorView& view, const RowBlock& block, std::int64_t first,
                  std::int64_t count, float* panel) const {
    for (std::int64_t i = 0; i < count; ++i) {
      load_row(view.data, view.dtype,
               row_offset(view, block.batch, block.keys.begin + first + i, block.kv_head),
               view.shape[3], rows_ + i * stride_);
    }
    std::fill_n(rows_ + count * stride_, (8 - count) * stride_, 0.0F);
    transpose(rows_, stride_, 8, view.shape[3], panel, 8);
  }

  // to[column] += Σ weight·row over the lanes whose weight is not 0; rows padded to whole vectors.
  static void add_kept_rows(std::int64_t lanes, const float* weights, const float* rows,
                            std::int64_t stride, std::int64_t dim, float* to) {
    const Floats d;
    for (std::int64_t column = 0; column < dim; column += kLanes) {
      FloatVec sum = hn::Zero(d);
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        if (weights[lane] == 0.0F) continue;
        const FloatVec row = hn::Load(d, rows + lane * stride + column);
        sum = hn::MulAdd(hn::Set(d, weights[lane]), row, sum);
      }
      hn::Store(hn::Add(hn::Load(d, to + column), sum), d, to + column);
    }
  }

  const AttentionProblem& problem_;
  std::int64_t head_dim_;
  std::int64_t value_dim_;
  std::int64_t chunk_keys_;
  std::int64_t stride_;
  float* k_;          // [keys / 8, head_dim, 8]
  float* k_columns_;  // [head_dim / 8, keys, 8]
  float* v_;          // [keys / 8, value_dim, 8]
  float* rows_;       // [8, stride]
  float* q_;          // [head_dim, lanes]
  float* grad_o_;     // [value_dim, lanes]
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_BACKWARD_PANELS_INL
