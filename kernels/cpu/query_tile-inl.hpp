// Rows of a tile of queries on their way from a call's tensors and back.
#if defined(ANNULUS_CPU_QUERY_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_QUERY_TILE_INL
#undef ANNULUS_CPU_QUERY_TILE_INL
#else
#define ANNULUS_CPU_QUERY_TILE_INL
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/forward_rows.hpp"
#include "kernels/cpu/logits_tile-inl.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/softmax_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Queries of one tile and their running softmax. Everything is transposed: a lane is a query.
struct QueryTile {
  TileRows rows;
  std::int64_t vectors = 0;
  float* q = nullptr;  // [head_dim, lanes]
  float* o = nullptr;  // [value_dim, lanes]
  LaneState state;
  char* parts = nullptr;  // of q, where products are split: right operands of the tile unit
  std::uint32_t odd = 0;  // lanes whose q does not split
  bool has_q = false;     // whether q is filled beside its parts
};

/// What a tile works in.
struct TileWork {
  float* p = nullptr;        // [keys, lanes]
  float* rescale = nullptr;  // [lanes]
  PairBuffers buffers;
  RowPrefetch* prefetch = nullptr;
};

/// p ← p·(what dropout keeps), where there is dropout.
inline void drop_weights(const AttentionProblem& problem, std::int64_t batch, const QueryTile& tile,
                         const KeyRun& run, const PairBuffers& buffers, float* p) {
  if (problem.dropout.probability <= 0.0F) return;
  load_dropout_tile(problem.dropout, batch, tile.rows, tile.vectors, run.keys, buffers.factor);
  multiply_tile(run.keys.size(), tile.vectors, buffers.factor, p);
}

/// Row `key` of K or V of a block, and the row a few later asked for.
inline void load_key_row(const ConstTensorView& view, const RowBlock& rows, Span keys,
                         std::int64_t key, float* to) {
  const std::int64_t at = row_offset(view, rows.batch, key, rows.kv_head);
  if (key + kRowsAhead < keys.end) prefetch_row(view, at + kRowsAhead * view.strides[1]);
  load_row(view.data, view.dtype, at, view.shape[3], to);
}

/// o ← o·rescale + Vᵀ·p, bit for bit as the product, without the terms of weight 0. `v` in panels
/// of its columns, [value_dim / 8, keys of a tile, 8].
inline void add_kept_values(QueryTile& tile, std::int64_t value_dim, std::int64_t keys,
                            const float* v, const float* p, const float* rescale) {
  const Floats d;
  for (std::int64_t column = 0; column < value_dim; ++column) {
    const float* values = v + column / 8 * (8 * kKeyTile) + column % 8;
    for (std::int64_t n = 0; n < tile.vectors; ++n) {
      FloatVec sum = hn::Zero(d);
      for (std::int64_t key = 0; key < keys; ++key) {
        const FloatVec weight = hn::Load(d, p + key * kTileLanes + n * kLanes);
        const FloatVec more = hn::MulAdd(hn::Set(d, values[key * 8]), weight, sum);
        sum = hn::IfThenElse(hn::Eq(weight, hn::Zero(d)), sum, more);
      }
      float* at = tile.o + column * kTileLanes + n * kLanes;
      hn::Store(hn::MulAdd(hn::Load(d, at), hn::Load(d, rescale + n * kLanes), sum), d, at);
    }
  }
}

/// Whether O is more than caches would keep for who reads it next: it is written past them.
inline bool streams_output(const ForwardCall& call) {
  constexpr std::int64_t kKeptBytes = std::int64_t{1} << 20;
  return call.o && call.o.shape.elements() * size_bytes(call.o.dtype) > kKeptBytes;
}

/// The running softmax of tiles: begun, or resumed from what is carried, and at the end finished or
/// carried on.
class CarriedRows {
 public:
  /// `rows`: room for the rows of a tile. `factor`: for one number a lane.
  CarriedRows(const ForwardCall& call, const ForwardBlock& block, float* rows, float* factor)
      : call_(call),
        block_(block),
        value_dim_(call.problem.value_dim()),
        stride_(tile_stride(value_dim_)),
        row_(rows),
        factor_(factor) {}

  void start(QueryTile& tile) {
    const bool resume = call_.start == ForwardCall::Start::resume && block_.partial == nullptr;
    std::fill_n(tile.o, value_dim_ * kTileLanes, 0.0F);
    std::fill_n(tile.state.max, kTileLanes, kMinusInfinity);
    std::fill_n(tile.state.sum, kTileLanes, 0.0F);
    if (resume) {
      resume_state(tile);
    } else if (call_.problem.sinks && block_.partial == nullptr) {
      for (std::int64_t lane = 0; lane < tile.rows.count; ++lane) {
        const std::int64_t head = tile.rows.head[static_cast<std::size_t>(lane)];
        const float sink = static_cast<const float*>(
            call_.problem.sinks.data)[head * call_.problem.sinks.strides[0]];
        tile.state.max[lane] = sink;
        tile.state.sum[lane] = sink == kMinusInfinity ? 0.0F : 1.0F;
      }
    }
  }

  void end(QueryTile& tile) {
    if (block_.partial != nullptr) {
      write_state(tile, *block_.partial);
    } else if (call_.o) {
      write_output(tile);
    } else {
      write_state(tile, call_.state);
    }
  }

 private:
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
               value_dim_, row_ + lane * stride_);
    }
    transpose(row_, stride_, kTileLanes, value_dim_, tile.o, kTileLanes);
  }

  void write_state(const QueryTile& tile, const AttentionState& state) {
    for (std::int64_t lane = 0; lane < tile.rows.count; ++lane) {
      write_statistic(state.row_max, tile, lane, tile.state.max[lane]);
      write_statistic(state.row_sum, tile, lane, tile.state.sum[lane]);
    }
    write_rows(tile, state.accumulator, nullptr);
  }

  void write_output(const QueryTile& tile) {
    for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
      const bool empty = tile.state.max[lane] == kMinusInfinity;
      factor_[lane] = empty ? 0.0F : 1.0F / tile.state.sum[lane];
      if (!call_.log_sum_exp || lane >= tile.rows.count) continue;
      write_statistic(
          call_.log_sum_exp, tile, lane,
          empty ? kMinusInfinity : tile.state.max[lane] + std::log(tile.state.sum[lane]));
    }
    write_rows(tile, call_.o, factor_);
  }

  void write_statistic(const TensorView& view, const QueryTile& tile, std::int64_t lane,
                       float value) {
    const auto i = static_cast<std::size_t>(lane);
    static_cast<float*>(view.data)[statistic_offset(view, block_.rows.batch, tile.rows.head[i],
                                                    tile.rows.query[i])] = value;
  }

  // Oᵀ of a tile as rows, each times its factor where there are factors: 0 leaves only zeros.
  void write_rows(const QueryTile& tile, const TensorView& view, const float* factors) {
    for (std::int64_t first = 0; first < tile.rows.count; first += kLanes) {
      transpose(tile.o + first, kTileLanes, value_dim_, kLanes, row_, stride_);
      const std::int64_t end = std::min(first + kLanes, tile.rows.count);
      for (std::int64_t lane = first; lane < end; ++lane) {
        const auto i = static_cast<std::size_t>(lane);
        float* row = row_ + (lane - first) * stride_;
        if (factors != nullptr) scale_row(factors[lane], row);
        const auto store = factors != nullptr && streams_output(call_) ? stream_row : store_row;
        store(row, value_dim_, view.data, view.dtype,
              row_offset(view, block_.rows.batch, tile.rows.query[i], tile.rows.head[i]));
      }
    }
    hwy::FlushStream();
  }

  void scale_row(float factor, float* row) const {
    if (factor == 0.0F) return (void)std::fill_n(row, value_dim_, 0.0F);
    for_each_part(value_dim_, [&](auto d, std::int64_t i) HWY_ATTR {
      hn::StoreU(hn::Mul(hn::LoadU(d, row + i), hn::Set(d, factor)), d, row + i);
    });
  }

  const ForwardCall& call_;
  const ForwardBlock& block_;
  std::int64_t value_dim_;
  std::int64_t stride_;
  float* row_;     // [lanes, value_dim]
  float* factor_;  // [lanes]
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_QUERY_TILE_INL
