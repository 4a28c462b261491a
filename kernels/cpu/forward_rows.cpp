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

// Keys packed at a time, and tiles of queries that meet a tile of keys in turn while it is in L2,
// their own q and o next to it.
constexpr std::int64_t kChunkKeys = 64 * kKeyTile;
constexpr std::size_t kTilesTogether = 8;

// One pass of FlashAttention (Dao, 2023) over the keys of a task. K and V are packed once for all
// its queries and heads, chunk by chunk, each tile when first needed.
class ForwardRows {
 public:
  ForwardRows(const ForwardCall& call, const ForwardBlock& block, Scratch& scratch)
      : call_(call),
        problem_(call.problem),
        block_(block),
        k_stride_(tile_stride(problem_.head_dim())),
        v_stride_(tile_stride(problem_.value_dim())) {
    const std::int64_t chunk = packed_keys(block.rows);
    k_ = scratch.take(chunk * problem_.head_dim());
    v_ = scratch.take(chunk * problem_.value_dim());
    p_ = scratch.take(kKeyTile * kTileLanes);
    rescale_ = scratch.take(kTileLanes);
    row_ = scratch.take(std::max<std::int64_t>(kTileLanes, 8) * std::max(k_stride_, v_stride_));
    buffers_ = {scratch.take(kPairRowsFloats), scratch.take(kKeyTile * kTileLanes),
                scratch.take(kKeyTile * kTileLanes), scratch.take(kKeyTile * kTileLanes), nullptr};
    for (std::int64_t row = 0; row < block.rows.rows();) {
      tiles_.push_back(make_tile(row, scratch));
      row += tiles_.back().rows.count;
    }
  }

  static std::int64_t scratch_floats(const AttentionProblem& problem, const RowBlock& block) {
    const std::int64_t k_stride = tile_stride(problem.head_dim());
    const std::int64_t v_stride = tile_stride(problem.value_dim());
    const std::int64_t tiles = (block.rows() + kTileLanes - 1) / kTileLanes;
    const std::int64_t per_tile = Scratch::room_for(kTileLanes) * 3 +
                                  Scratch::room_for(problem.head_dim() * kTileLanes) +
                                  Scratch::room_for(problem.value_dim() * kTileLanes);
    return packed_keys(block) * (problem.head_dim() + problem.value_dim()) +
           4 * kKeyTile * kTileLanes + kPairRowsFloats +
           std::max<std::int64_t>(kTileLanes, 8) * std::max(k_stride, v_stride) + tiles * per_tile +
           512;
  }

  void compute() {
    for (const Slice& slice : problem_.mask.of_batch(block_.rows.batch)) {
      const Slice part = clip(slice, block_.rows.queries, block_.rows.keys);
      if (!part.q.empty() && !part.k.empty()) slices_.push_back(part);
    }
    const Span all = block_.rows.keys;
    std::int64_t key = all.begin;
    do {
      add_chunk(intersect(all, {key, key + kChunkKeys}));
      key += kChunkKeys;
    } while (key < all.end);
  }

 private:
  static std::int64_t packed_keys(const RowBlock& block) {
    return std::min(kChunkKeys, round_up(block.keys.size(), kKeyTile));
  }

  QueryTile make_tile(std::int64_t first_row, Scratch& scratch) {
    // A last tile of one vector would be bound by its broadcasts: four vectors go as 2 + 2.
    const std::int64_t left = block_.rows.rows() - first_row;
    const bool share = left > kTileLanes && left <= kTileLanes + kLanes;
    QueryTile tile;
    tile.rows = rows_of_tile(block_.rows, first_row, share ? 2 * kLanes : kTileLanes);
    tile.vectors = (tile.rows.count + kLanes - 1) / kLanes;
    tile.q = scratch.take(problem_.head_dim() * kTileLanes);
    tile.o = scratch.take(problem_.value_dim() * kTileLanes);
    tile.state = {scratch.take(kTileLanes), scratch.take(kTileLanes)};
    return tile;
  }

  void load_queries(QueryTile& tile) {
    for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      prefetch_row(problem_.q, row_offset(problem_.q, block_.rows.batch, tile.rows.query[i],
                                          tile.rows.head[i]));
    }
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

  void add_chunk(Span chunk) {
    packed_.assign(static_cast<std::size_t>((chunk.size() + kKeyTile - 1) / kKeyTile), false);
    for (std::size_t first = 0; first < tiles_.size(); first += kTilesTogether) {
      const auto tiles = std::span(tiles_).subspan(first);
      const auto together = tiles.first(std::min(kTilesTogether, tiles.size()));
      if (chunk.begin == block_.rows.keys.begin) start_tiles(together);
      prefetch_rows(together, problem_.q, together.size());
      if (call_.o) prefetch_rows(together, call_.o, 0);
      for (std::size_t i = 0; i < packed_.size(); ++i) {
        const std::int64_t key = chunk.begin + static_cast<std::int64_t>(i) * kKeyTile;
        add_keys(together, i, intersect(chunk, {key, key + kKeyTile}));
      }
      if (chunk.end != block_.rows.keys.end) continue;
      for (QueryTile& tile : together) end_tile(tile);
    }
  }

  void start_tiles(std::span<QueryTile> tiles) {
    for (QueryTile& tile : tiles) {
      load_queries(tile);
      start_state(tile);
    }
  }

  // Rows of a view [batch, seq_q, heads, dim] that belong to `tiles`, or as many `ahead` of them.
  void prefetch_rows(std::span<QueryTile> tiles, const ConstTensorView& view, std::size_t ahead) {
    const Span heads = block_.rows.q_heads;
    const std::int64_t queries = tiles.back().rows.queries.end - tiles.front().rows.queries.begin;
    const Span wanted = intersect(block_.rows.queries,
                                  {tiles.front().rows.queries.begin + (ahead > 0 ? queries : 0),
                                   tiles.back().rows.queries.end + (ahead > 0 ? queries : 0)});
    if (view.strides[2] != view.shape[3] && heads.size() > 1) return;
    prefetch_.add(RowPrefetch::Order::last, view,
                  row_offset(view, block_.rows.batch, wanted.begin, heads.begin), view.strides[1],
                  heads.size() * view.shape[3], wanted.size());
  }

  void add_keys(std::span<QueryTile> tiles, std::size_t index, Span keys) {
    const std::int64_t offset = static_cast<std::int64_t>(index) * kKeyTile;
    const float* k = k_ + offset * problem_.head_dim();
    const float* v = v_ + offset * problem_.value_dim();
    for (QueryTile& tile : tiles) {
      for (const KeyRun& run : runs_.find(slices_, tile.rows.queries, keys)) {
        if (!packed_[index]) pack_keys(keys, offset);
        packed_[index] = true;
        add_run(tile, run, run.keys.begin - keys.begin, k, v);
      }
    }
  }

  // K of a tile in panels of keys, [keys / 8, head_dim, 8]; V in panels of its columns,
  // [value_dim / 8, keys, 8]. Keys beyond the last are zeros: their products are computed and never
  // read.
  void pack_keys(Span keys, std::int64_t offset) {
    for (const ConstTensorView* view : {&problem_.k, &problem_.v}) {
      const Span next = intersect(block_.rows.keys, {keys.end, keys.end + kKeyTile});
      prefetch_.add(RowPrefetch::Order::first, *view,
                    row_offset(*view, block_.rows.batch, next.begin, block_.rows.kv_head),
                    view->strides[1], view->shape[3], next.size());
    }
    const std::int64_t head_dim = problem_.head_dim();
    for (std::int64_t key = keys.begin; key < keys.end; ++key) {
      const std::int64_t i = key - keys.begin;
      load_key_row(problem_.k, keys, key, row_ + i % 8 * k_stride_);
      if (i % 8 == 7 || key + 1 == keys.end) {
        const std::int64_t empty = 7 - i % 8;
        std::fill_n(row_ + (8 - empty) * k_stride_, empty * k_stride_, 0.0F);
        transpose(row_, k_stride_, 8, head_dim, k_ + (offset + i / 8 * 8) * head_dim, 8);
      }
    }
    for (std::int64_t key = keys.begin; key < keys.end; ++key) {
      load_key_row(problem_.v, keys, key, row_);
      store_in_panels(row_, problem_.value_dim(), kKeyTile, key - keys.begin,
                      v_ + offset * problem_.value_dim());
    }
  }

  void load_key_row(const ConstTensorView& view, Span keys, std::int64_t key, float* to) {
    const std::int64_t at = row_offset(view, block_.rows.batch, key, block_.rows.kv_head);
    if (key + kRowsAhead < keys.end) prefetch_row(view, at + kRowsAhead * view.strides[1]);
    load_row(view.data, view.dtype, at, view.shape[3], to);
  }

  // One tile of Sᵀ = K·Qᵀ, its softmax, and Oᵀ = Oᵀ·rescale + Vᵀ·Pᵀ. The product takes whole panels
  // of keys around the run.
  void add_run(QueryTile& tile, const KeyRun& run, std::int64_t first_key, const float* k,
               const float* v) {
    const std::int64_t keys = run.keys.size();
    const std::int64_t before = first_key % 8;
    const std::int64_t head_dim = problem_.head_dim();
    float* p = p_ + before * kTileLanes;
    gemm<Update::overwrite, Layout::panels>({round_up(before + keys, 8), tile.vectors, head_dim},
                                            {k + (first_key - before) * head_dim, 8 * head_dim},
                                            tile.q, kTileLanes, p_, kTileLanes, nullptr,
                                            &prefetch_);
    products_to_logits({problem_, block_.rows.batch, tile.rows, tile.vectors, run}, buffers_, p);
    softmax_tile(keys, tile.vectors, logit_factor(problem_), p, tile.state, rescale_);
    if (problem_.dropout.probability > 0.0F) {
      load_dropout_tile(problem_.dropout, block_.rows.batch, tile.rows, tile.vectors, run.keys,
                        buffers_.factor);
      multiply_tile(keys, tile.vectors, buffers_.factor, p);
    }
    if (!run.full && !values_are_finite(keys, v + first_key * 8)) {
      return add_kept_values(tile, keys, v + first_key * 8, p);
    }
    gemm<Update::rescale, Layout::panels>({problem_.value_dim(), tile.vectors, keys},
                                          {v + first_key * 8, 8 * kKeyTile}, p, kTileLanes, tile.o,
                                          kTileLanes, rescale_, &prefetch_);
  }

  bool values_are_finite(std::int64_t keys, const float* v) const {
    for (std::int64_t column = 0; column < problem_.value_dim(); column += 8) {
      if (!all_finite(v + column * kKeyTile, keys * 8)) return false;
    }
    return true;
  }

  // The same sums, bit for bit, without the terms of weight 0.
  void add_kept_values(QueryTile& tile, std::int64_t keys, const float* v, const float* p) const {
    const Floats d;
    for (std::int64_t column = 0; column < problem_.value_dim(); ++column) {
      const float* values = v + column / 8 * (8 * kKeyTile) + column % 8;
      for (std::int64_t n = 0; n < tile.vectors; ++n) {
        FloatVec sum = hn::Zero(d);
        for (std::int64_t key = 0; key < keys; ++key) {
          const FloatVec weight = hn::Load(d, p + key * kTileLanes + n * kLanes);
          const FloatVec more = hn::MulAdd(hn::Set(d, values[key * 8]), weight, sum);
          sum = hn::IfThenElse(hn::Eq(weight, hn::Zero(d)), sum, more);
        }
        float* at = tile.o + column * kTileLanes + n * kLanes;
        hn::Store(hn::MulAdd(hn::Load(d, at), hn::Load(d, rescale_ + n * kLanes), sum), d, at);
      }
    }
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
                      const auto empty = hn::Eq(factor, hn::Zero(d));
                      hn::Store(hn::IfThenZeroElse(empty, hn::Mul(hn::Load(d, at), factor)), d, at);
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
  float* k_ = nullptr;        // [key tiles, keys / 8, head_dim, 8]
  float* v_ = nullptr;        // [key tiles, value_dim / 8, keys, 8]
  float* p_ = nullptr;        // [keys, lanes]
  float* rescale_ = nullptr;  // [lanes]
  float* row_ = nullptr;      // [lanes, head_dim or value_dim]
  PairBuffers buffers_;
  RowPrefetch prefetch_;
  std::vector<bool> packed_;  // by key tile of the chunk
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
