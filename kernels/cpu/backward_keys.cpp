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
    if (!splits_) {
      for (float** panels : {&k_, &k_columns_}) *panels = scratch.take(keys * head_dim_);
      v_ = scratch.take(keys * value_dim_);
    }
    rows_buffer_ = scratch.take(8 * std::max(k_stride_, v_stride_));
    q_rows_ = scratch.take(kTileLanes * k_stride_);
    grad_o_rows_ = scratch.take(kTileLanes * v_stride_);
    std::fill_n(q_rows_, kTileLanes * k_stride_, 0.0F);
    std::fill_n(grad_o_rows_, kTileLanes * v_stride_, 0.0F);
    q_ = scratch.take(head_dim_ * kTileLanes);
    dq_ = scratch.take(head_dim_ * kTileLanes);
    grad_o_ = scratch.take(value_dim_ * kTileLanes);
    for (float** tile :
         {&p_, &ds_, &buffers_.addend, &buffers_.kept, &buffers_.factor, &buffers_.capped}) {
      *tile = scratch.take((kKeyTile + 8) * kTileLanes);
    }
    buffers_.rows = scratch.take(kPairRowsFloats);
    lse_ = scratch.take(kTileLanes);
    delta_ = scratch.take(kTileLanes);
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
    const std::int64_t packed =
        splits_on_amx(problem.q.dtype) ? 0 : keys * (2 * problem.head_dim() + problem.value_dim());
    return (keys + 8) * strides + packed + (8 + kTileLanes) * strides +
           kTileLanes * (2 * problem.head_dim() + problem.value_dim()) +
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
  static std::int64_t operand_floats([[maybe_unused]] const AttentionProblem& problem) {
#if ANNULUS_AMX
    if (uses_amx(problem.q.dtype)) {
      return BackwardOperands::floats(problem, backward_chunk_keys(problem));
    }
    if (splits_on_amx(problem.q.dtype)) {
      return BackwardSplit::floats(problem, backward_chunk_keys(problem));
    }
#endif
#if ANNULUS_PAIRS
    if (uses_bf16_dots(problem.q.dtype)) {
      return BackwardPairs::floats(problem, backward_chunk_keys(problem));
    }
#endif
    return 0;
  }

  // K and V in panels of keys, [keys / 8, dim, 8], and K also in panels of its columns,
  // [head_dim / 8, keys, 8], for dQ.
  void load_keys() {
    const std::int64_t keys = rows_.keys.size();
    std::fill_n(dk_, (keys + 8) * k_stride_, 0.0F);
    std::fill_n(dv_, (keys + 8) * v_stride_, 0.0F);
#if ANNULUS_AMX
    if (split_) return split_->load_keys();
#endif
    for (std::int64_t first = 0; first < keys; first += 8) {
      const std::int64_t count = std::min<std::int64_t>(8, keys - first);
      load_panel(problem_.k, first, count, k_stride_, k_ + first * head_dim_);
      if (dots_) continue;
      for (std::int64_t i = 0; i < count; ++i) {
        store_in_panels(rows_buffer_ + i * k_stride_, head_dim_, backward_chunk_keys(problem_),
                        first + i, k_columns_);
      }
      load_panel(problem_.v, first, count, v_stride_, v_ + first * value_dim_);
    }
#if ANNULUS_AMX
    if (amx_) operands_->load_keys(problem_, rows_);
#endif
#if ANNULUS_PAIRS
    if (pairs_) pairs_->load_keys(problem_, rows_);
#endif
  }

  void load_panel(const ConstTensorView& view, std::int64_t first, std::int64_t count,
                  std::int64_t stride, float* panel) {
    for (std::int64_t i = 0; i < count; ++i) {
      load_row(view.data, view.dtype,
               row_offset(view, rows_.batch, rows_.keys.begin + first + i, rows_.kv_head),
               view.shape[3], rows_buffer_ + i * stride);
    }
    std::fill_n(rows_buffer_ + count * stride, (8 - count) * stride, 0.0F);
    transpose(rows_buffer_, stride, 8, view.shape[3], panel, 8);
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
    transpose(q_rows_, k_stride_, kTileLanes, head_dim_, q_, kTileLanes);
    transpose(grad_o_rows_, v_stride_, kTileLanes, value_dim_, grad_o_, kTileLanes);
    if (problem_.scale < 0.0F) {
      for (std::int64_t i = 0; i < head_dim_ * kTileLanes; ++i) q_[i] = -q_[i];
    }
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
    if (masked && !operands_are_finite(first - before, panels)) {
      return add_kept_products(tile, first, p, ds);
    }
#if ANNULUS_AMX
    if (amx_) return add_half_products(tile, first - before, before, panels);
#endif
#if ANNULUS_PAIRS
    if (pairs_) {
      clear_outside(before, keys, panels);
      return pairs_->add_gradients(tile.vectors, first - before, panels, p_, ds_,
                                   {call_.grad_q ? dq_ : nullptr, dk_, dv_, k_stride_, v_stride_},
                                   &prefetch_);
    }
#endif
    add_products(tile, first, p, ds);
  }

  // K·Qᵀ and V·dOᵀ for whole panels of keys.
  void multiply_queries(const LogitsTile& tile, std::int64_t first, std::int64_t keys) {
#if ANNULUS_AMX
    if (amx_) return multiply_half_queries(tile.vectors, first, keys);
    if (split_) return split_->multiply_queries(tile.vectors, first, keys, p_, ds_, prefetch_);
#endif
#if ANNULUS_PAIRS
    if (pairs_) return pairs_->multiply(tile.vectors, first, keys, p_, ds_, &prefetch_);
#endif
    gemm<Update::overwrite, Layout::panels>({keys, tile.vectors, head_dim_},
                                            {k_ + first * head_dim_, 8 * head_dim_}, q_, kTileLanes,
                                            p_, kTileLanes, nullptr, &prefetch_);
    gemm<Update::overwrite, Layout::panels>({keys, tile.vectors, value_dim_},
                                            {v_ + first * value_dim_, 8 * value_dim_}, grad_o_,
                                            kTileLanes, ds_, kTileLanes, nullptr, &prefetch_);
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

  // Of the right operands of dV, dK and dQ.
  bool operands_are_finite(std::int64_t first, std::int64_t keys) const {
    return all_finite(grad_o_rows_, kTileLanes * v_stride_) &&
           all_finite(q_rows_, kTileLanes * k_stride_) &&
           all_finite(k_ + first * head_dim_, keys * head_dim_);
  }

  // The same sums, bit for bit, without the terms of weight 0, which a mask may have dropped.
  void add_kept_products(const LogitsTile& tile, std::int64_t first, const float* p,
                         const float* ds) {
    const std::int64_t keys = tile.run.keys.size();
    for (std::int64_t i = 0; i < keys; ++i) {
      add_kept_rows(tile.rows.count, p + i * kTileLanes, grad_o_rows_, v_stride_, value_dim_,
                    dv_ + (first + i) * v_stride_);
      add_kept_rows(tile.rows.count, ds + i * kTileLanes, q_rows_, k_stride_, head_dim_,
                    dk_ + (first + i) * k_stride_);
    }
    if (!call_.grad_q) return;
    const Floats d;
    for_each_vector(
        head_dim_, tile.vectors, dq_, [&](std::int64_t column, std::int64_t v, float* at) HWY_ATTR {
          FloatVec sum = hn::Zero(d);
          for (std::int64_t i = 0; i < keys; ++i) {
            const FloatVec weight = hn::Load(d, ds + i * kTileLanes + v * kLanes);
            const float k = k_[(first + i) / 8 * 8 * head_dim_ + column * 8 + (first + i) % 8];
            sum = hn::IfThenElse(hn::Eq(weight, hn::Zero(d)), sum,
                                 hn::MulAdd(hn::Set(d, k), weight, sum));
          }
          hn::Store(hn::Add(hn::Load(d, at), sum), d, at);
        });
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

  // dV += P·dO, dK += dS·Q, dQᵀ += Kᵀ·dSᵀ. The first two write whole panels of keys: the rows
  // beyond the run add zeros to their neighbours.
  void add_products(const LogitsTile& tile, std::int64_t first, float* p, float* ds) {
    const std::int64_t keys = tile.run.keys.size();
    const std::int64_t panels = round_up(keys, 8);
    std::fill_n(p + keys * kTileLanes, (panels - keys) * kTileLanes, 0.0F);
    std::fill_n(ds + keys * kTileLanes, (panels - keys) * kTileLanes, 0.0F);
    const std::int64_t k_vectors = (head_dim_ + kLanes - 1) / kLanes;
    const std::int64_t v_vectors = (value_dim_ + kLanes - 1) / kLanes;
    gemm<Update::add, Layout::tile>({panels, v_vectors, tile.rows.count}, tile_rows(p),
                                    grad_o_rows_, v_stride_, dv_ + first * v_stride_, v_stride_);
    gemm<Update::add, Layout::tile>({panels, k_vectors, tile.rows.count}, tile_rows(ds), q_rows_,
                                    k_stride_, dk_ + first * k_stride_, k_stride_);
    if (!call_.grad_q) return;
    gemm<Update::add, Layout::panels>({head_dim_, tile.vectors, keys},
                                      {k_columns_ + first * 8, 8 * backward_chunk_keys(problem_)},
                                      ds, kTileLanes, dq_, kTileLanes);
  }

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
  float* k_ = nullptr;            // [keys / 8, head_dim, 8]
  float* k_columns_ = nullptr;    // [head_dim / 8, keys, 8]
  float* v_ = nullptr;            // [keys / 8, value_dim, 8]
  float* dk_ = nullptr;           // [keys, head_dim]
  float* dv_ = nullptr;           // [keys, value_dim]
  float* rows_buffer_ = nullptr;  // [8, head_dim or value_dim]
  float* q_rows_ = nullptr;       // [lanes, head_dim]
  float* grad_o_rows_ = nullptr;  // [lanes, value_dim]
  float* q_ = nullptr;            // [head_dim, lanes], as dq
  float* dq_ = nullptr;
  float* grad_o_ = nullptr;  // [value_dim, lanes]
  float* p_ = nullptr;       // [keys + panel, lanes], as ds
  float* ds_ = nullptr;
  std::int64_t lanes_;  // queries of a tile
  bool amx_;
  bool splits_;
  bool dots_;
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
