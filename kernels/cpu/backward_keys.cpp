#include "kernels/cpu/backward_keys.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/cpu/key_runs.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/backward_keys.cpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"
#include "kernels/cpu/backward_operands-inl.hpp"
#include "kernels/cpu/backward_pairs-inl.hpp"
#include "kernels/cpu/backward_panels-inl.hpp"
#include "kernels/cpu/backward_split-inl.hpp"
#include "kernels/cpu/gradient_tile-inl.hpp"
#include "kernels/cpu/logits_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

// Gradients through one chunk of keys (FlashAttention, algorithm 4, with lanes as queries): K, V,
// dK and dV of the chunk stay, tiles of queries stream by from last to first, so that under a
// causal mask all chunks start with the same tiles and wait for each other only once.
class BackwardKeys {
 public:
  BackwardKeys(const BackwardCall& call, const RowBlock& rows, Scratch& scratch)
      : call_(call),
        problem_(call.problem),
        rows_(rows),
        head_dim_(problem_.head_dim()),
        value_dim_(problem_.value_dim()),
        k_stride_(tile_stride(head_dim_)),
        v_stride_(tile_stride(value_dim_)),
        lanes_(backward_lanes(problem_)),
        amx_(uses_amx(problem_.q.dtype)),
        splits_(splits_on_amx(problem_.q.dtype)),
        dots_(uses_bf16_dots(problem_.q.dtype)) {
    const std::int64_t keys = backward_chunk_keys(problem_);
#if ANNULUS_AMX
    if (amx_) operands_.emplace(problem_, keys, scratch);
#endif
#if ANNULUS_PAIRS
    if (dots_) pairs_.emplace(problem_, keys, scratch);
#endif
    dk_ = scratch.take((keys + 8) * k_stride_);
    dv_ = scratch.take((keys + 8) * v_stride_);
    q_rows_ = scratch.take(kTileLanes * k_stride_);
    grad_o_rows_ = scratch.take(kTileLanes * v_stride_);
    std::fill_n(q_rows_, kTileLanes * k_stride_, 0.0F);
    std::fill_n(grad_o_rows_, kTileLanes * v_stride_, 0.0F);
    dq_ = scratch.take(head_dim_ * kTileLanes);
    for (float** tile :
         {&p_, &ds_, &buffers_.addend, &buffers_.kept, &buffers_.factor, &buffers_.capped}) {
      *tile = scratch.take((kKeyTile + 8) * kTileLanes);
    }
    buffers_.rows = scratch.take(kPairRowsFloats);
    lse_ = scratch.take(kTileLanes);
    delta_ = scratch.take(kTileLanes);
    if (!splits_) panels_.emplace(problem_, keys, scratch);
#if ANNULUS_AMX
    if (splits_) {
      split_.emplace(
          problem_, rows_, keys,
          BackwardSplit::Rows{q_rows_, grad_o_rows_, dq_, dk_, dv_, k_stride_, v_stride_}, scratch);
    }
#endif
  }

  static std::int64_t scratch_floats(const AttentionProblem& problem) {
    const std::int64_t strides = tile_stride(problem.head_dim()) + tile_stride(problem.value_dim());
    const std::int64_t keys = backward_chunk_keys(problem);
    return (keys + 8 + kTileLanes) * strides + kTileLanes * problem.head_dim() +
           6 * (kKeyTile + 8) * kTileLanes + kPairRowsFloats + 2 * kTileLanes + 32 * 24 +
           operand_floats(problem);
  }

  void compute(std::int64_t chunk, AccumulationOrder& order) {
    for (const Slice& slice : problem_.mask.of_batch(rows_.batch)) {
      const Slice part = clip(slice, rows_.queries, rows_.keys);
      if (!part.q.empty() && !part.k.empty()) slices_.push_back(part);
    }
    if (slices_.empty()) return;
    const AmxScope amx(amx_ || splits_);
    load_keys();
    for (std::int64_t tile = order.tiles() - 1; tile >= 0; --tile) {
      if (!order.meets(chunk, tile)) continue;
      if (tile > 0) prefetch_queries(rows_of_tile(rows_, (tile - 1) * lanes_, lanes_));
      add_queries(rows_of_tile(rows_, tile * lanes_, lanes_));
      order.wait(chunk, tile);
      if (call_.grad_q) write_grad_q(tile * lanes_);
      order.pass(tile);
    }
    write_grad_keys();
  }

 private:
  static std::int64_t operand_floats(const AttentionProblem& problem) {
    const std::int64_t keys = backward_chunk_keys(problem);
#if ANNULUS_AMX
    if (splits_on_amx(problem.q.dtype)) return BackwardSplit::floats(problem, keys);
#endif
    std::int64_t floats = BackwardPanels::floats(problem, keys);
#if ANNULUS_AMX
    if (uses_amx(problem.q.dtype)) floats += BackwardOperands::floats(problem, keys);
#endif
#if ANNULUS_PAIRS
    if (uses_bf16_dots(problem.q.dtype)) floats += BackwardPairs::floats(problem, keys);
#endif
    return floats;
  }

  void load_keys() {
    const std::int64_t keys = rows_.keys.size();
    std::fill_n(dk_, (keys + 8) * k_stride_, 0.0F);
    std::fill_n(dv_, (keys + 8) * v_stride_, 0.0F);
#if ANNULUS_AMX
    if (split_) return split_->load_keys();
#endif
    panels_->load_keys(rows_, dots_ ? BackwardPanels::Kept::k : BackwardPanels::Kept::all);
#if ANNULUS_AMX
    if (amx_) operands_->load_keys(problem_, rows_);
#endif
#if ANNULUS_PAIRS
    if (pairs_) pairs_->load_keys(problem_, rows_);
#endif
  }

  void prefetch_queries(const TileRows& rows) {
    const Span heads = rows_.q_heads;
    for (const ConstTensorView& view :
         {problem_.q, call_.grad_o, static_cast<ConstTensorView>(call_.grad_q)}) {
      if (!view || (heads.size() > 1 && view.strides[2] != view.shape[3])) continue;
      prefetch_.add(RowPrefetch::Order::last, view,
                    row_offset(view, rows_.batch, rows.queries.begin, heads.begin), view.strides[1],
                    heads.size() * view.shape[3], rows.queries.size());
    }
  }

  void load_queries(const TileRows& rows) {
    for (std::int64_t lane = 0; lane < rows.count; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      prefetch_row(problem_.q, row_offset(problem_.q, rows_.batch, rows.query[i], rows.head[i]));
      prefetch_row(call_.grad_o,
                   row_offset(call_.grad_o, rows_.batch, rows.query[i], rows.head[i]));
    }
    for (std::int64_t lane = 0; lane < lanes_; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      const std::int64_t head = rows.head[i];
      const std::int64_t query = rows.query[i];
      float* q = q_rows_ + lane * k_stride_;
      float* grad_o = grad_o_rows_ + lane * v_stride_;
      const float lse = statistic(call_.log_sum_exp, head, query);
      if (lse == kMinusInfinity) {
        // A row without keys: nothing of it may count, whatever its tensors hold.
        std::fill_n(q, head_dim_, 0.0F);
        std::fill_n(grad_o, value_dim_, 0.0F);
        lse_[lane] = std::numeric_limits<float>::infinity();
        delta_[lane] = 0.0F;
        continue;
      }
      load_row(problem_.q.data, problem_.q.dtype, row_offset(problem_.q, rows_.batch, query, head),
               head_dim_, q);
      load_row(call_.grad_o.data, call_.grad_o.dtype,
               row_offset(call_.grad_o, rows_.batch, query, head), value_dim_, grad_o);
      lse_[lane] = lse;
      delta_[lane] = statistic(call_.delta, head, query);
    }
#if ANNULUS_AMX
    if (split_) return split_->load_queries(rows.count);
#endif
#if ANNULUS_PAIRS
    if (pairs_) {
      return pairs_->load_queries(q_rows_, k_stride_, grad_o_rows_, v_stride_, rows.count,
                                  problem_.scale < 0.0F);
    }
#endif
    panels_->load_queries(query_rows());
#if ANNULUS_AMX
    if (amx_) {
      operands_->load_queries(q_rows_, k_stride_, grad_o_rows_, v_stride_, rows.count,
                              problem_.scale < 0.0F);
    }
#endif
  }

  float statistic(const ConstTensorView& view, std::int64_t head, std::int64_t query) const {
    return static_cast<const float*>(view.data)[statistic_offset(view, rows_.batch, head, query)];
  }

  void add_queries(const TileRows& rows) {
    load_queries(rows);
    std::fill_n(dq_, head_dim_ * kTileLanes, 0.0F);
    const std::int64_t vectors = (rows.count + kLanes - 1) / kLanes;
    for (std::int64_t key = rows_.keys.begin; key < rows_.keys.end; key += kKeyTile) {
      const Span keys{key, std::min(key + kKeyTile, rows_.keys.end)};
      for (const KeyRun& run : runs_.find(slices_, rows.queries, keys)) {
        add_run({problem_, rows_.batch, rows, vectors, run});
      }
    }
  }

  void add_run(const LogitsTile& tile) {
    const std::int64_t keys = tile.run.keys.size();
    const std::int64_t first = tile.run.keys.begin - rows_.keys.begin;
    const std::int64_t whole = amx_ || splits_ ? 32 : 8;
    const std::int64_t before = first % whole;
    const std::int64_t panels = round_up(before + keys, whole);
    float* p = p_ + before * kTileLanes;
    float* ds = ds_ + before * kTileLanes;
    multiply_queries(tile, first - before, panels);
    products_to_logits(tile, buffers_, p);
    const bool masked =
        !tile.run.full || problem_.dense_mask || ((amx_ || dots_) && panels != keys);
    const auto recompute = masked ? recompute_probabilities<true> : recompute_probabilities<false>;
    recompute(keys, tile.vectors, logit_factor(problem_), lse_, p);
    const bool dropout = problem_.dropout.probability > 0.0F;
    if (dropout) {
      load_dropout_tile(problem_.dropout, rows_.batch, tile.rows, tile.vectors, tile.run.keys,
                        buffers_.factor);
      multiply_tile(keys, tile.vectors, buffers_.factor, ds);
    }
    logit_gradient(keys, tile.vectors, p, delta_, ds);
    if (dropout) multiply_tile(keys, tile.vectors, buffers_.factor, p);
    if (call_.grad_bias) {
      add_pair_tile(call_.grad_bias, rows_.batch, tile.rows, tile.run.keys, ds);
    }
    if (problem_.soft_cap > 0.0F) {
      cap_gradient(keys, tile.vectors, buffers_.capped, problem_.soft_cap, ds);
    }
#if ANNULUS_AMX
    if (split_) {
      clear_outside(before, keys, panels);
      return split_->add_products(tile.rows.count, first - before, panels, p_, ds_,
                                  static_cast<bool>(call_.grad_q));
    }
#endif
    const BackwardSums sums{call_.grad_q ? dq_ : nullptr, dk_, dv_, k_stride_, v_stride_};
    if (masked && !panels_->finite(query_rows(), first - before, panels)) {
      return panels_->add_kept(tile, first, p, ds, query_rows(), sums);
    }
#if ANNULUS_AMX
    if (amx_) return add_half_products(tile, first - before, before, panels);
#endif
#if ANNULUS_PAIRS
    if (pairs_) {
      clear_outside(before, keys, panels);
      return pairs_->add_gradients(tile.vectors, first - before, panels, p_, ds_, sums, &prefetch_);
    }
#endif
    panels_->add_gradients(tile, first, p, ds, query_rows(), sums);
  }

  QueryRows query_rows() const { return {q_rows_, grad_o_rows_, k_stride_, v_stride_}; }

  // K·Qᵀ and V·dOᵀ for whole panels of keys.
  void multiply_queries(const LogitsTile& tile, std::int64_t first, std::int64_t keys) {
#if ANNULUS_AMX
    if (amx_) return multiply_half_queries(tile.vectors, first, keys);
    if (split_) return split_->multiply_queries(tile.vectors, first, keys, p_, ds_, prefetch_);
#endif
#if ANNULUS_PAIRS
    if (pairs_) return pairs_->multiply(tile.vectors, first, keys, p_, ds_, &prefetch_);
#endif
    panels_->multiply(tile.vectors, first, keys, p_, ds_, &prefetch_);
  }

#if ANNULUS_AMX
  void multiply_half_queries(std::int64_t vectors, std::int64_t first, std::int64_t keys) {
    const std::int64_t k_bytes = BackwardOperands::tile_bytes(head_dim_);
    const std::int64_t v_bytes = BackwardOperands::tile_bytes(value_dim_);
    for (std::int64_t key = 0; key < keys; key += 2 * kAmxRows) {
      const std::int64_t tile = (first + key) / kAmxRows;
      amx_product(2, vectors, k_bytes / kAmxBytes, {operands_->k + tile * k_bytes, k_bytes},
                  operands_->q, p_ + key * kTileLanes);
      amx_product(2, vectors, v_bytes / kAmxBytes, {operands_->v + tile * v_bytes, v_bytes},
                  operands_->grad_o, ds_ + key * kTileLanes);
      prefetch_.step();
    }
  }

  // Weights of `all` keys before and after those of a run.
  void clear_outside(std::int64_t before, std::int64_t keys, std::int64_t all) {
    for (float* rows : {p_, ds_}) {
      std::fill(rows, rows + before * kTileLanes, 0.0F);
      std::fill(rows + (before + keys) * kTileLanes, rows + all * kTileLanes, 0.0F);
    }
  }

  // As add_products, for `all` keys of which those around the run weigh nothing.
  void add_half_products(const LogitsTile& tile, std::int64_t first, std::int64_t before,
                         std::int64_t all) {
    clear_outside(before, tile.run.keys.size(), all);
    store_left_lanes(all, tile.vectors, p_, operands_->p);
    store_left_lanes(all, tile.vectors, ds_, operands_->ds);
    const std::int64_t steps = tile.rows.count > kAmxDepth ? 2 : 1;
    add_to_keys(all, steps, operands_->p, operands_->grad_o_rows, value_dim_, v_stride_,
                dv_ + first * v_stride_);
    add_to_keys(all, steps, operands_->ds, operands_->q_rows, head_dim_, k_stride_,
                dk_ + first * k_stride_);
    if (call_.grad_q) add_to_queries(tile.vectors, first, all);
  }

  // to[key, column] += left·right.
  void add_to_keys(std::int64_t keys, std::int64_t steps, const char* left,
                   const std::uint32_t* right, std::int64_t dim, std::int64_t stride, float* to) {
    const Floats d;
    const std::int64_t all_vectors = (dim + kLanes - 1) / kLanes;
    for (std::int64_t vector = 0; vector < all_vectors; vector += kTileVectors) {
      const std::int64_t vectors = std::min<std::int64_t>(kTileVectors, all_vectors - vector);
      for (std::int64_t key = 0; key < keys; key += 2 * kAmxRows) {
        amx_product(2, vectors, steps, {left + key / kAmxRows * 2 * kAmxBytes, 2 * kAmxBytes},
                    right + vector / kTileVectors * kRightWords, operands_->products);
        for_each_vector(2 * kAmxRows, vectors, operands_->products,
                        [&](std::int64_t i, std::int64_t v, float* at) HWY_ATTR {
                          float* sum = to + (key + i) * stride + (vector + v) * kLanes;
                          hn::Store(hn::Add(hn::Load(d, sum), hn::Load(d, at)), d, sum);
                        });
      }
    }
  }

  void add_to_queries(std::int64_t vectors, std::int64_t first, std::int64_t keys) {
    const Floats d;
    store_pairs(keys, vectors, ds_, operands_->pairs);
    const std::int64_t bytes = operands_->column_tile_bytes();
    const float* products = operands_->products;
    const char* left = operands_->k_columns + first / kAmxDepth * kAmxBytes;
    for (std::int64_t row = 0; row < head_dim_; row += 2 * kAmxRows) {
      const std::int64_t rows = std::min(head_dim_ - row, 2 * kAmxRows);
      amx_product((rows + kAmxRows - 1) / kAmxRows, vectors, keys / kAmxDepth,
                  {left + row / kAmxRows * bytes, bytes}, operands_->pairs, operands_->products);
      float* dq = dq_ + row * kTileLanes;
      for_each_vector(rows, vectors, dq, [&](std::int64_t, std::int64_t, float* at) HWY_ATTR {
        hn::Store(hn::Add(hn::Load(d, at), hn::Load(d, products + (at - dq))), d, at);
      });
    }
  }
#endif

  void write_grad_q(std::int64_t first_row) {
    const TileRows rows = rows_of_tile(rows_, first_row, lanes_);
    transpose(dq_, kTileLanes, head_dim_, kTileLanes, q_rows_, k_stride_);
    for (std::int64_t lane = 0; lane < rows.count; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      add_scaled(q_rows_ + lane * k_stride_, problem_.scale, head_dim_,
                 static_cast<float*>(call_.grad_q.data) +
                     row_offset(call_.grad_q, rows_.batch, rows.query[i], rows.head[i]));
    }
  }

  void write_grad_keys() {
    for (std::int64_t key = rows_.keys.begin; key < rows_.keys.end; ++key) {
      const std::int64_t i = key - rows_.keys.begin;
      if (call_.grad_k) {
        add_scaled(dk_ + i * k_stride_, problem_.scale, head_dim_,
                   static_cast<float*>(call_.grad_k.data) +
                       row_offset(call_.grad_k, rows_.batch, key, rows_.kv_head));
      }
      if (call_.grad_v) {
        add_scaled(dv_ + i * v_stride_, 1.0F, value_dim_,
                   static_cast<float*>(call_.grad_v.data) +
                       row_offset(call_.grad_v, rows_.batch, key, rows_.kv_head));
      }
    }
  }

  const BackwardCall& call_;
  const AttentionProblem& problem_;
  const RowBlock& rows_;
  std::int64_t head_dim_;
  std::int64_t value_dim_;
  std::int64_t k_stride_;
  std::int64_t v_stride_;
  float* dk_ = nullptr;           // [keys, head_dim]
  float* dv_ = nullptr;           // [keys, value_dim]
  float* q_rows_ = nullptr;       // [lanes, head_dim]
  float* grad_o_rows_ = nullptr;  // [lanes, value_dim]
  float* dq_ = nullptr;           // [head_dim, lanes]
  float* p_ = nullptr;            // [keys + panel, lanes], as ds
  float* ds_ = nullptr;
  std::int64_t lanes_;  // queries of a tile
  bool amx_;
  bool splits_;
  bool dots_;
  std::optional<BackwardPanels> panels_;  // unless splits_
#if ANNULUS_AMX
  std::optional<BackwardSplit> split_;        // where splits_
  std::optional<BackwardOperands> operands_;  // where amx_
#endif
#if ANNULUS_PAIRS
  std::optional<BackwardPairs> pairs_;  // where dots_
#endif
  float* lse_ = nullptr;    // [lanes]
  float* delta_ = nullptr;  // [lanes]
  PairBuffers buffers_;
  std::vector<Slice> slices_;
  KeyRuns runs_;
  // About 250 products of a tile see it, and it has 48 rows of three tensors.
  RowPrefetch prefetch_{8};
};

std::int64_t tile_rows_on_target(const AttentionProblem& problem) {
  return backward_lanes(problem);
}

std::int64_t chunk_keys_on_target(const AttentionProblem& problem) {
  const std::int64_t dims = problem.head_dim() + problem.value_dim();
  if (splits_on_amx(problem.q.dtype)) return (dims <= 128 ? 8 : dims <= 256 ? 2 : 1) * kKeyTile;
  return (dims <= 256 ? 4 : 2) * kKeyTile;
}

std::int64_t backward_scratch_on_target(const AttentionProblem& problem) {
  return BackwardKeys::scratch_floats(problem);
}

void backward_keys_on_target(const BackwardCall& call, const RowBlock& rows, std::int64_t chunk,
                             AccumulationOrder& order, Scratch& scratch) {
  BackwardKeys(call, rows, scratch).compute(chunk, order);
}

}  // namespace
}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus::kernels {

HWY_EXPORT(tile_rows_on_target);
HWY_EXPORT(chunk_keys_on_target);
HWY_EXPORT(backward_scratch_on_target);
HWY_EXPORT(backward_keys_on_target);

std::int64_t backward_chunk_keys(const AttentionProblem& problem) {
  return HWY_DYNAMIC_DISPATCH(chunk_keys_on_target)(problem);
}

std::int64_t backward_tile_rows(const AttentionProblem& problem) {
  return HWY_DYNAMIC_DISPATCH(tile_rows_on_target)(problem);
}

std::int64_t backward_scratch(const AttentionProblem& problem) {
  return HWY_DYNAMIC_DISPATCH(backward_scratch_on_target)(problem);
}

void backward_keys(const BackwardCall& call, const RowBlock& rows, std::int64_t chunk,
                   AccumulationOrder& order, Scratch& scratch) {
  HWY_DYNAMIC_DISPATCH(backward_keys_on_target)(call, rows, chunk, order, scratch);
}

}  // namespace annulus::kernels
#endif  // HWY_ONCE
