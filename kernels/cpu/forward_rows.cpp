#include "kernels/cpu/forward_rows.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/key_runs.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/forward_rows.cpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"
#include "kernels/cpu/logits_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

// Queries of one tile and their running softmax. Everything is transposed: a lane is a query.
struct QueryTile {
  TileRows rows;
  std::int64_t vectors = 0;
  float* q = nullptr;  // [head_dim, lanes]
  float* o = nullptr;  // [value_dim, lanes]
  LaneState state;
};

// One pass of FlashAttention (Dao, 2023) over the keys of a block. The key tile is the outer loop,
// so that its conversion to fp32 is shared by all queries of all heads of the group.
class ForwardRows {
 public:
  ForwardRows(const ForwardCall& call, const ForwardBlock& block, Scratch& scratch)
      : call_(call),
        problem_(call.problem),
        block_(block),
        k_stride_(tile_stride(problem_.head_dim())),
        v_stride_(tile_stride(problem_.value_dim())) {
    k_ = scratch.take((kKeyTile + 8) * k_stride_);
    v_ = scratch.take(kKeyTile * v_stride_);
    p_ = scratch.take((kKeyTile + 8) * kTileLanes);
    rescale_ = scratch.take(kTileLanes);
    row_ = scratch.take(kTileLanes * std::max(k_stride_, v_stride_));
    buffers_ = {scratch.take(kPairRowsFloats), scratch.take(kKeyTile * kTileLanes),
                scratch.take(kKeyTile * kTileLanes), scratch.take(kKeyTile * kTileLanes), nullptr};
    for (std::int64_t row = 0; row < block.rows.rows(); row += kTileLanes) {
      tiles_.push_back(start_tile(row, scratch));
    }
  }

  static std::int64_t scratch_floats(const AttentionProblem& problem, const RowBlock& block) {
    const std::int64_t k_stride = tile_stride(problem.head_dim());
    const std::int64_t v_stride = tile_stride(problem.value_dim());
    const std::int64_t tiles = (block.rows() + kTileLanes - 1) / kTileLanes;
    const std::int64_t per_tile = Scratch::room_for(kTileLanes) * 3 +
                                  Scratch::room_for(problem.head_dim() * kTileLanes) +
                                  Scratch::room_for(problem.value_dim() * kTileLanes);
    return (kKeyTile + 8) * (k_stride + v_stride) + 5 * (kKeyTile + 8) * kTileLanes +
           kPairRowsFloats + kTileLanes * std::max(k_stride, v_stride) + tiles * per_tile + 512;
  }

  void compute() {
    for (const Slice& slice : problem_.mask.of_batch(block_.rows.batch)) {
      const Slice part = clip(slice, block_.rows.queries, block_.rows.keys);
      if (!part.q.empty() && !part.k.empty()) slices_.push_back(part);
    }
    for (std::int64_t key = block_.rows.keys.begin; key < block_.rows.keys.end; key += kKeyTile) {
      add_keys({key, std::min(key + kKeyTile, block_.rows.keys.end)});
    }
    for (QueryTile& tile : tiles_) end_tile(tile);
  }

 private:
  QueryTile start_tile(std::int64_t first_row, Scratch& scratch) {
    QueryTile tile;
    tile.rows = rows_of_tile(block_.rows, first_row, kTileLanes);
    tile.vectors = (tile.rows.count + kLanes - 1) / kLanes;
    tile.q = scratch.take(problem_.head_dim() * kTileLanes);
    tile.o = scratch.take(problem_.value_dim() * kTileLanes);
    tile.state = {scratch.take(kTileLanes), scratch.take(kTileLanes)};
    load_queries(tile);
    start_state(tile);
    return tile;
  }

  void load_queries(QueryTile& tile) {
    for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      float* row = row_ + lane * k_stride_;
      load_row(problem_.q.data, problem_.q.dtype,
               row_offset(problem_.q, block_.rows.batch, tile.rows.query[i], tile.rows.head[i]),
               problem_.head_dim(), row);
      if (problem_.scale < 0.0F) {
        for (std::int64_t d = 0; d < problem_.head_dim(); ++d) row[d] = -row[d];
      }
    }
    transpose(row_, k_stride_, kTileLanes, problem_.head_dim(), tile.q, kTileLanes);
  }

  void start_state(QueryTile& tile) {
    const bool resume = call_.start == ForwardCall::Start::resume && block_.partial == nullptr;
    std::fill_n(tile.o, problem_.value_dim() * kTileLanes, 0.0F);
    std::fill_n(tile.state.max, kTileLanes, kMinusInfinity);
    std::fill_n(tile.state.sum, kTileLanes, 0.0F);
    if (resume) {
      resume_state(tile);
    } else if (problem_.sinks && block_.partial == nullptr) {
      for (std::int64_t lane = 0; lane < tile.rows.count; ++lane) {
        const std::int64_t head = tile.rows.head[static_cast<std::size_t>(lane)];
        const float sink =
            static_cast<const float*>(problem_.sinks.data)[head * problem_.sinks.strides[0]];
        tile.state.max[lane] = sink;
        tile.state.sum[lane] = sink == kMinusInfinity ? 0.0F : 1.0F;
      }
    }
  }

  void resume_state(QueryTile& tile) {
    const AttentionState& carried = call_.state;
    const std::int64_t batch = block_.rows.batch;
    for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      const std::int64_t at =
          statistic_offset(carried.row_max, batch, tile.rows.head[i], tile.rows.query[i]);
      const std::int64_t sum_at =
          statistic_offset(carried.row_sum, batch, tile.rows.head[i], tile.rows.query[i]);
      tile.state.max[lane] = static_cast<const float*>(carried.row_max.data)[at];
      tile.state.sum[lane] = static_cast<const float*>(carried.row_sum.data)[sum_at];
      load_row(carried.accumulator.data, DType::f32,
               row_offset(carried.accumulator, batch, tile.rows.query[i], tile.rows.head[i]),
               problem_.value_dim(), row_ + lane * v_stride_);
    }
    transpose(row_, v_stride_, kTileLanes, problem_.value_dim(), tile.o, kTileLanes);
  }

  void add_keys(Span keys) {
    bool loaded = false;
    for (QueryTile& tile : tiles_) {
      for (const KeyRun& run : runs_.find(slices_, tile.rows.queries, keys)) {
        if (!loaded) load_keys(keys);
        loaded = true;
        add_run(tile, run, run.keys.begin - keys.begin);
      }
    }
  }

  void load_keys(Span keys) {
    const std::int64_t head = block_.rows.kv_head;
    for (std::int64_t key = keys.begin; key < keys.end; ++key) {
      const std::int64_t i = key - keys.begin;
      load_row(problem_.k.data, problem_.k.dtype,
               row_offset(problem_.k, block_.rows.batch, key, head), problem_.head_dim(),
               k_ + i * k_stride_);
      load_row(problem_.v.data, problem_.v.dtype,
               row_offset(problem_.v, block_.rows.batch, key, head), problem_.value_dim(),
               v_ + i * v_stride_);
    }
  }

  // One tile of Sᵀ = K·Qᵀ, its softmax, and Oᵀ = Oᵀ·rescale + Vᵀ·Pᵀ. The product's rows are rounded
  // up to a panel: they read rows of K beyond the run, and nobody reads what comes of them.
  void add_run(QueryTile& tile, const KeyRun& run, std::int64_t first_key) {
    const std::int64_t keys = run.keys.size();
    gemm<Update::overwrite, Adjacent::steps>({round_up(keys, 8), tile.vectors, problem_.head_dim()},
                                             k_ + first_key * k_stride_, k_stride_, tile.q,
                                             kTileLanes, p_, kTileLanes);
    products_to_logits({problem_, block_.rows.batch, tile.rows, tile.vectors, run}, buffers_, p_);
    softmax_tile(keys, tile.vectors, logit_factor(problem_), p_, tile.state, rescale_);
    if (problem_.dropout.probability > 0.0F) {
      load_dropout_tile(problem_.dropout, block_.rows.batch, tile.rows, tile.vectors, run.keys,
                        buffers_.factor);
      multiply_tile(keys, tile.vectors, buffers_.factor, p_);
    }
    gemm<Update::rescale, Adjacent::rows>({problem_.value_dim(), tile.vectors, keys},
                                          v_ + first_key * v_stride_, v_stride_, p_, kTileLanes,
                                          tile.o, kTileLanes, rescale_);
  }

  void end_tile(QueryTile& tile) {
    if (block_.partial != nullptr) {
      write_state(tile, *block_.partial);
    } else if (call_.o) {
      write_output(tile);
    } else {
      write_state(tile, call_.state);
    }
  }

  void write_state(const QueryTile& tile, const AttentionState& state) {
    for (std::int64_t lane = 0; lane < tile.rows.count; ++lane) {
      write_statistic(state.row_max, tile, lane, tile.state.max[lane]);
      write_statistic(state.row_sum, tile, lane, tile.state.sum[lane]);
    }
    write_rows(tile, state.accumulator);
  }

  void write_output(QueryTile& tile) {
    const Floats d;
    for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
      const bool empty = tile.state.max[lane] == kMinusInfinity;
      rescale_[lane] = empty ? 0.0F : 1.0F / tile.state.sum[lane];
      if (!call_.log_sum_exp || lane >= tile.rows.count) continue;
      write_statistic(
          call_.log_sum_exp, tile, lane,
          empty ? kMinusInfinity : tile.state.max[lane] + std::log(tile.state.sum[lane]));
    }
    for_each_vector(problem_.value_dim(), tile.vectors, tile.o,
                    [&](std::int64_t, std::int64_t v, float* at) HWY_ATTR {
                      const FloatVec factor = hn::Load(d, rescale_ + v * kLanes);
                      hn::Store(hn::Mul(hn::Load(d, at), factor), d, at);
                    });
    write_rows(tile, call_.o);
  }

  void write_statistic(const TensorView& view, const QueryTile& tile, std::int64_t lane,
                       float value) {
    const auto i = static_cast<std::size_t>(lane);
    static_cast<float*>(view.data)[statistic_offset(view, block_.rows.batch, tile.rows.head[i],
                                                    tile.rows.query[i])] = value;
  }

  void write_rows(const QueryTile& tile, const TensorView& view) {
    transpose(tile.o, kTileLanes, problem_.value_dim(), kTileLanes, row_, v_stride_);
    for (std::int64_t lane = 0; lane < tile.rows.count; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      store_row(row_ + lane * v_stride_, problem_.value_dim(), view.data, view.dtype,
                row_offset(view, block_.rows.batch, tile.rows.query[i], tile.rows.head[i]));
    }
  }

  const ForwardCall& call_;
  const AttentionProblem& problem_;
  const ForwardBlock& block_;
  std::int64_t k_stride_;
  std::int64_t v_stride_;
  float* k_ = nullptr;        // [keys + panel, head_dim]
  float* v_ = nullptr;        // [keys, value_dim]
  float* p_ = nullptr;        // [keys + panel, lanes]
  float* rescale_ = nullptr;  // [lanes]
  float* row_ = nullptr;      // [lanes, head_dim or value_dim]
  PairBuffers buffers_;
  std::vector<QueryTile> tiles_;
  std::vector<Slice> slices_;
  KeyRuns runs_;
};

std::int64_t forward_scratch_on_target(const AttentionProblem& problem, const RowBlock& block) {
  return ForwardRows::scratch_floats(problem, block);
}

void forward_rows_on_target(const ForwardCall& call, const ForwardBlock& block, Scratch& scratch) {
  ForwardRows(call, block, scratch).compute();
}

}  // namespace
}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus::kernels {

HWY_EXPORT(forward_scratch_on_target);
HWY_EXPORT(forward_rows_on_target);

std::int64_t forward_scratch(const AttentionProblem& problem, const RowBlock& block) {
  return HWY_DYNAMIC_DISPATCH(forward_scratch_on_target)(problem, block);
}

void forward_rows(const ForwardCall& call, const ForwardBlock& block, Scratch& scratch) {
  HWY_DYNAMIC_DISPATCH(forward_rows_on_target)(call, block, scratch);
}

}  // namespace annulus::kernels
#endif  // HWY_ONCE
