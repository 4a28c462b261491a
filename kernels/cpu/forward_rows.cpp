#include "kernels/cpu/forward_rows.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "kernels/cpu/key_runs.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/forward_rows.cpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"
#include "kernels/cpu/amx_products-inl.hpp"
#include "kernels/cpu/dot_rows-inl.hpp"
#include "kernels/cpu/logits_tile-inl.hpp"
#include "kernels/cpu/query_tile-inl.hpp"
#include "kernels/cpu/split_rows-inl.hpp"
#include "kernels/cpu/vector_rows-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

// Keys packed at a time, and tiles of queries that meet a tile of keys in turn while it is in L2,
// their own q and o next to it.
constexpr std::int64_t kChunkKeys = 64 * kKeyTile;
constexpr std::int64_t kTilesTogether = 16;

// One pass of FlashAttention (Dao, 2023) over the keys of a task. K and V are packed once for all
// its queries and heads, chunk by chunk, each tile when first needed.
class ForwardRows {
 public:
  ForwardRows(const ForwardCall& call, const ForwardBlock& block, Scratch& scratch)
      : call_(call),
        problem_(call.problem),
        block_(block),
        k_stride_(tile_stride(problem_.head_dim())),
        v_stride_(tile_stride(problem_.value_dim())),
        amx_(uses_amx(problem_.q.dtype)),
        splits_(splits_on_amx(problem_.q.dtype)),
        dots_(uses_bf16_dots(problem_.q.dtype)),
        room_(key_room(problem_, block.rows)),
        tile_in_slot_(static_cast<std::size_t>(room_.keys / kKeyTile)) {
    const std::int64_t chunk = room_.keys;
#if ANNULUS_AMX
    if (amx_) take_amx(chunk, scratch);
#endif
    p_ = scratch.take(kKeyTile * kTileLanes);
    rescale_ = scratch.take(kTileLanes);
    row_ = scratch.take(std::max<std::int64_t>(kTileLanes, 8) * std::max(k_stride_, v_stride_));
    buffers_ = {scratch.take(kPairRowsFloats), scratch.take(kKeyTile * kTileLanes),
                scratch.take(kKeyTile * kTileLanes), scratch.take(kKeyTile * kTileLanes), nullptr};
    const TileWork work{p_, rescale_, buffers_, &prefetch_};
#if ANNULUS_AMX
    if (splits_) split_.emplace(problem_, block, chunk, scratch, work);
#endif
#if ANNULUS_PAIRS
    if (dots_) dot_.emplace(problem_, block, chunk, scratch, work);
#endif
    if (!amx_ && !splits_ && !dots_) vector_.emplace(problem_, block, chunk, scratch, work);
    carried_.emplace(call, block, row_, rescale_);
    for (std::int64_t row = 0; row < block.rows.rows();) {
      tiles_.push_back(make_tile(row, scratch));
      row += tiles_.back().rows.count;
    }
  }

  static std::int64_t scratch_floats(const AttentionProblem& problem, const RowBlock& block) {
    const std::int64_t k_stride = tile_stride(problem.head_dim());
    const std::int64_t v_stride = tile_stride(problem.value_dim());
    const std::int64_t lanes = tile_lanes(splits_on_amx(problem.q.dtype));
    std::int64_t tiles = (block.rows() + lanes - 1) / lanes;
    const KeyRoom room = key_room(problem, block);
    if (room.narrow) tiles = std::min(tiles, kTilesTogether);
    const std::int64_t per_tile = Scratch::room_for(kTileLanes) * 3 + split_query_floats(problem) +
                                  Scratch::room_for(packed_dim(problem.head_dim()) * kTileLanes) +
                                  Scratch::room_for(problem.value_dim() * kTileLanes);
    return packed_floats(problem, room.keys) +
           (uses_amx(problem.q.dtype) ? amx_floats(problem) : 0) + 4 * kKeyTile * kTileLanes +
           kPairRowsFloats + std::max<std::int64_t>(kTileLanes, 8) * std::max(k_stride, v_stride) +
           tiles * per_tile + 512;
  }

  void compute() {
    const AmxScope amx(amx_ || splits_);
    slices_ = slices_of(problem_, block_.rows);
    const Span all = block_.rows.keys;
    if (room_.narrow) return add_chunk(all);
    std::int64_t key = all.begin;
    do {
      add_chunk(intersect(all, {key, key + kChunkKeys}));
      key += kChunkKeys;
    } while (key < all.end);
  }

 private:
  // Extra scratch: weights in pairs, products of values, rows on their way, V in f32.
  static std::int64_t amx_floats(const AttentionProblem& problem) {
    const std::int64_t depth = round_up(std::max(problem.head_dim(), problem.value_dim()), 32);
    return kKeyTile / 2 * kTileLanes + 2 * kAmxRows * kTileLanes + kAmxDepth * depth / 2 +
           kAmxRows * depth + kKeyTile * problem.value_dim() + 5 * 32;
  }

  static std::int64_t tile_lanes(bool splits) { return splits ? 2 * kLanes : kTileLanes; }

  // K and V of a chunk.
  static std::int64_t packed_floats(const AttentionProblem& problem, std::int64_t keys) {
#if ANNULUS_AMX
    if (splits_on_amx(problem.q.dtype)) return SplitRows::scratch_floats(problem, keys);
#endif
#if ANNULUS_PAIRS
    if (uses_bf16_dots(problem.q.dtype)) return DotRows::scratch_floats(problem, keys);
#endif
    if (uses_amx(problem.q.dtype)) {
      return keys * (packed_dim(problem.head_dim()) + packed_dim(problem.value_dim()));
    }
    return VectorRows::scratch_floats(problem, keys);
  }

  static std::int64_t split_query_floats([[maybe_unused]] const AttentionProblem& problem) {
#if ANNULUS_AMX
    if (splits_on_amx(problem.q.dtype)) return SplitRows::query_floats(problem);
#endif
    return 0;
  }

  // Columns of a packed row in floats: also enough for bf16 up to a multiple of 32.
  static std::int64_t packed_dim(std::int64_t dim) { return std::max<std::int64_t>(dim, 16); }

  // Keys that have room at a time. Where tiles of queries that meet keys in turn see few of the
  // block's, as under a window, they are done with all of them before the next ones start: those
  // reuse their memory, which stays in L2.
  struct KeyRoom {
    std::int64_t keys = 0;
    bool narrow = false;
  };

  static KeyRoom key_room(const AttentionProblem& problem, const RowBlock& block) {
    const std::int64_t all = std::min(kChunkKeys, round_up(block.keys.size(), kKeyTile));
    if (uses_amx(problem.q.dtype) || splits_on_amx(problem.q.dtype)) return {all, false};
    const std::int64_t together = most_keys_together(problem, block);
    if (together > kChunkKeys || 2 * together > block.keys.size()) return {all, false};
    return {together, true};
  }

  static std::int64_t most_keys_together(const AttentionProblem& problem, const RowBlock& block) {
    const std::vector<Slice> slices = slices_of(problem, block);
    const std::int64_t step = kTilesTogether * kTileLanes;
    const std::int64_t heads = block.q_heads.size();
    std::int64_t most = kKeyTile;
    for (std::int64_t row = 0; row < block.rows(); row += step) {
      // Where the two last tiles share their rows, the next may start a tile earlier.
      const Span queries{
          block.queries.begin + std::max<std::int64_t>(row - kTileLanes, 0) / heads,
          std::min(block.queries.begin + (row + step) / heads + 1, block.queries.end)};
      const Span seen = keys_seen(slices, queries, block.keys);
      most = std::max(most, round_up(seen.size(), kKeyTile));
    }
    return most;
  }

  QueryTile make_tile(std::int64_t first_row, Scratch& scratch) {
    // A last tile of one vector would be bound by its broadcasts: four vectors go as 2 + 2.
    const std::int64_t left = block_.rows.rows() - first_row;
    const bool share = left > kTileLanes && left <= kTileLanes + kLanes;
    QueryTile tile;
    tile.rows = rows_of_tile(block_.rows, first_row, tile_lanes(splits_ || share));
    tile.vectors = (tile.rows.count + kLanes - 1) / kLanes;
    if (room_.narrow && tiles_.size() >= kTilesTogether) {
      const QueryTile& done = tiles_[tiles_.size() - kTilesTogether];
      tile.q = done.q;
      tile.o = done.o;
      tile.state = done.state;
      return tile;
    }
    tile.q = scratch.take(packed_dim(problem_.head_dim()) * kTileLanes);
    tile.o = scratch.take(problem_.value_dim() * kTileLanes);
    tile.state = {scratch.take(kTileLanes), scratch.take(kTileLanes)};
    if (splits_) {
      tile.parts = reinterpret_cast<char*>(scratch.take(split_query_floats(problem_)));
    }
    return tile;
  }

  void load_queries(QueryTile& tile) {
    for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      prefetch_row(problem_.q, row_offset(problem_.q, block_.rows.batch, tile.rows.query[i],
                                          tile.rows.head[i]));
    }
#if ANNULUS_AMX
    if (amx_) return load_half_queries(tile);
    if (split_) return split_->load_queries(tile);
#endif
#if ANNULUS_PAIRS
    if (dot_) return dot_->load_queries(tile);
#endif
    vector_->load_queries(tile);
  }

  void add_chunk(Span chunk) {
    std::fill(tile_in_slot_.begin(), tile_in_slot_.end(), -1);
    finite_.assign(tile_in_slot_.size(), false);
    for (std::size_t first = 0; first < tiles_.size(); first += kTilesTogether) {
      const auto tiles = std::span(tiles_).subspan(first);
      const auto together = tiles.first(std::min<std::size_t>(kTilesTogether, tiles.size()));
      if (chunk.begin == block_.rows.keys.begin) start_tiles(together);
      prefetch_rows(together, problem_.q, together.size());
      if (call_.o && !streams_output(call_)) prefetch_rows(together, call_.o, 0);
      const Span seen = keys_seen(
          slices_, {together.front().rows.queries.begin, together.back().rows.queries.end}, chunk);
      for (std::int64_t key = seen.begin; key < seen.end; key += kKeyTile) {
        add_keys(together, (key - chunk.begin) / kKeyTile, intersect(chunk, {key, key + kKeyTile}));
      }
#if ANNULUS_AMX
      if (split_) split_->finish();
#endif
      if (chunk.end != block_.rows.keys.end) continue;
      for (QueryTile& tile : together) carried_->end(tile);
    }
  }

  void start_tiles(std::span<QueryTile> tiles) {
    for (QueryTile& tile : tiles) {
      load_queries(tile);
      carried_->start(tile);
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

  // `number`: of the tile of keys in its chunk.
  void add_keys(std::span<QueryTile> tiles, std::int64_t number, Span keys) {
    const std::size_t index = static_cast<std::size_t>(number) % tile_in_slot_.size();
    for (QueryTile& tile : tiles) {
      for (const KeyRun& run : runs_.find(slices_, tile.rows.queries, keys)) {
        if (tile_in_slot_[index] != number) pack_keys(keys, index);
        tile_in_slot_[index] = number;
#if ANNULUS_AMX
        if (amx_) {
          add_run_on_tiles(tile, run, run.keys.begin - keys.begin, index);
          continue;
        }
        if (split_) {
          split_->add_run(tile, run, run.keys.begin - keys.begin, index);
          continue;
        }
#endif
#if ANNULUS_PAIRS
        if (dot_) {
          dot_->add_run(tile, run, run.keys.begin - keys.begin, index);
          continue;
        }
#endif
        vector_->add_run(tile, run, run.keys.begin - keys.begin, index);
      }
    }
  }

  void pack_keys(Span keys, std::size_t index) {
    for (const ConstTensorView* view : {&problem_.k, &problem_.v}) {
      const Span next = intersect(block_.rows.keys, {keys.end, keys.end + kKeyTile});
      prefetch_.add(RowPrefetch::Order::first, *view,
                    row_offset(*view, block_.rows.batch, next.begin, block_.rows.kv_head),
                    view->strides[1], view->shape[3], next.size());
    }
#if ANNULUS_AMX
    if (amx_) return pack_half_keys(keys, index);
    if (split_) return split_->pack(keys, index);
#endif
#if ANNULUS_PAIRS
    if (dot_) return dot_->pack(keys, index);
#endif
    vector_->pack(keys, index);
  }

#if ANNULUS_AMX
  static constexpr std::int64_t kKeySteps = kKeyTile / kAmxDepth;

  void take_amx(std::int64_t chunk, Scratch& scratch) {
    k_ = scratch.take(chunk * packed_dim(problem_.head_dim()));
    v_ = scratch.take(chunk * packed_dim(problem_.value_dim()));
    const std::int64_t depth = round_up(std::max(problem_.head_dim(), problem_.value_dim()), 32);
    pairs_ = reinterpret_cast<std::uint32_t*>(scratch.take(kKeyTile / 2 * kTileLanes));
    products_ = scratch.take(2 * kAmxRows * kTileLanes);
    half_rows_ = reinterpret_cast<std::uint16_t*>(scratch.take(kAmxDepth * depth / 2));
    pair_rows_ = scratch.take(kAmxRows * depth);
    values_ = scratch.take(kKeyTile * problem_.value_dim());
  }

  // Q as right operands: pairs of its columns, [head_dim / 2, lanes].
  void load_half_queries(QueryTile& tile) {
    const std::int64_t depth = round_up(problem_.head_dim(), kAmxDepth);
    const std::uint16_t sign = problem_.scale < 0.0F ? 0x8000 : 0;
    for (std::int64_t lane = 0; lane < kTileLanes; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      auto* row = reinterpret_cast<std::uint16_t*>(row_ + lane * k_stride_);
      copy_half_row(
          static_cast<const std::uint16_t*>(problem_.q.data) +
              row_offset(problem_.q, block_.rows.batch, tile.rows.query[i], tile.rows.head[i]),
          problem_.head_dim(), row);
      for (std::int64_t d = 0; d < depth; ++d) row[d] = static_cast<std::uint16_t>(row[d] ^ sign);
    }
    transpose(row_, k_stride_, kTileLanes, depth / 2, tile.q, kTileLanes);
  }

  // K and Vᵀ of a tile as left operands; keys beyond the last are zeros.
  void pack_half_keys(Span keys, std::size_t index) {
    char* k = packed_halves(k_, problem_.head_dim(), index);
    char* v = packed_halves(v_, problem_.value_dim(), index);
    const std::int64_t depth = round_up(problem_.value_dim(), kAmxDepth);
    __m512i largest = _mm512_setzero_si512();
    for (std::int64_t first = 0; first < kKeyTile; first += kAmxDepth) {
      for (std::int64_t i = first; i < first + kAmxDepth; ++i) {
        load_half_key(problem_.k, keys, keys.begin + i, half_rows_);
        store_left_row(half_rows_, problem_.head_dim(), i, k);
      }
      for (std::int64_t i = 0; i < kAmxDepth; ++i) {
        load_half_key(problem_.v, keys, keys.begin + first + i, half_rows_ + i * depth);
      }
      largest = _mm512_max_epu16(
          largest, store_left_columns(half_rows_, depth, problem_.value_dim(), kKeySteps,
                                      pair_rows_, v + first / kAmxDepth * kAmxBytes));
    }
    finite_[index] = halves_finite(largest);
  }

  // K or V of a key tile; 128 keys of two bytes each take no more than packed_dim floats.
  char* packed_halves(float* packed, std::int64_t dim, std::size_t index) const {
    return reinterpret_cast<char*>(packed +
                                   static_cast<std::int64_t>(index) * kKeyTile * packed_dim(dim));
  }

  void load_half_key(const ConstTensorView& view, Span keys, std::int64_t key, std::uint16_t* to) {
    if (key >= keys.end) {
      std::fill_n(to, round_up(view.shape[3], kAmxDepth), std::uint16_t{0});
      return;
    }
    const std::int64_t at = row_offset(view, block_.rows.batch, key, block_.rows.kv_head);
    if (key + kRowsAhead < keys.end) prefetch_row(view, at + kRowsAhead * view.strides[1]);
    copy_half_row(static_cast<const std::uint16_t*>(view.data) + at, view.shape[3], to);
  }

  // As add_run, in steps of 32 keys of the tile; weights outside the run are 0.
  void add_run_on_tiles(QueryTile& tile, const KeyRun& run, std::int64_t first_key,
                        std::size_t index) {
    const std::int64_t keys = run.keys.size();
    const std::int64_t before = first_key % kAmxDepth;
    const std::int64_t first_step = first_key / kAmxDepth;
    const std::int64_t all = round_up(before + keys, kAmxDepth);
    const std::int64_t depth_steps = round_up(problem_.head_dim(), kAmxDepth) / kAmxDepth;
    const std::int64_t k_tile_bytes = depth_steps * kAmxBytes;
    const char* k = packed_halves(k_, problem_.head_dim(), index) + first_step * 2 * k_tile_bytes;
    for (std::int64_t key = 0; key < all; key += 2 * kAmxRows) {
      amx_product(2, tile.vectors, depth_steps, {k + key / kAmxRows * k_tile_bytes, k_tile_bytes},
                  tile.q, p_ + key * kTileLanes);
      prefetch_.step();
    }
    float* p = p_ + before * kTileLanes;
    products_to_logits({problem_, block_.rows.batch, tile.rows, tile.vectors, run}, buffers_, p);
    const float factor = logit_factor(problem_);
    const bool edges = !run.full || problem_.dense_mask || all != keys;
    if (problem_.dropout.probability > 0.0F || (edges && !finite_[index])) {
      softmax_tile(keys, tile.vectors, factor, p, tile.state, rescale_);
      drop_weights(problem_, block_.rows.batch, tile, run, buffers_, p);
      if (edges && !finite_[index]) {
        load_values(run.keys);
        return add_kept_values(tile, problem_.value_dim(), keys, values_, p, rescale_);
      }
      fill_outside(before, keys, all, 0.0F);
      store_pairs(all, tile.vectors, p_, pairs_);
    } else {
      fill_outside(before, keys, all, kMinusInfinity);
      softmax_pairs(all, tile.vectors, factor, p_, tile.state, rescale_, pairs_);
    }
    add_values_on_tiles(tile, all / kAmxDepth,
                        packed_halves(v_, problem_.value_dim(), index) + first_step * kAmxBytes);
  }

  // Of `all` keys those before and after a run.
  void fill_outside(std::int64_t before, std::int64_t keys, std::int64_t all, float value) {
    std::fill_n(p_, before * kTileLanes, value);
    std::fill(p_ + (before + keys) * kTileLanes, p_ + all * kTileLanes, value);
  }

  void add_values_on_tiles(QueryTile& tile, std::int64_t steps, const char* v) {
    const Floats d;
    const std::int64_t tile_bytes = kKeySteps * kAmxBytes;
    for (std::int64_t row = 0; row < problem_.value_dim(); row += 2 * kAmxRows) {
      const std::int64_t rows = std::min(problem_.value_dim() - row, 2 * kAmxRows);
      float* o = tile.o + row * kTileLanes;
      amx_product((rows + kAmxRows - 1) / kAmxRows, tile.vectors, steps,
                  {v + row / kAmxRows * tile_bytes, tile_bytes}, pairs_, products_);
      for_each_vector(rows, tile.vectors, o, [&](std::int64_t, std::int64_t n, float* at) HWY_ATTR {
        const FloatVec sum = hn::Load(d, products_ + (at - o));
        hn::Store(hn::MulAdd(hn::Load(d, at), hn::Load(d, rescale_ + n * kLanes), sum), d, at);
      });
      prefetch_.step();
    }
  }

  // V of some keys in f32, in panels of its columns from the first of them on.
  void load_values(Span keys) {
    for (std::int64_t key = keys.begin; key < keys.end; ++key) {
      load_key_row(problem_.v, block_.rows, keys, key, row_);
      store_in_panels(row_, problem_.value_dim(), kKeyTile, key - keys.begin, values_);
    }
  }
#endif

  const ForwardCall& call_;
  const AttentionProblem& problem_;
  const ForwardBlock& block_;
  std::int64_t k_stride_;
  std::int64_t v_stride_;
  float* p_ = nullptr;        // [keys, lanes]
  float* rescale_ = nullptr;  // [lanes]
  float* row_ = nullptr;      // [lanes, head_dim or value_dim]
  bool amx_;
  bool splits_;
  bool dots_;
#if ANNULUS_PAIRS
  std::optional<DotRows> dot_;  // where dots_
#endif
#if ANNULUS_AMX
  std::optional<SplitRows> split_;      // where splits_
  float* k_ = nullptr;                  // [key tiles], left operands
  float* v_ = nullptr;                  // [key tiles], left operands
  std::uint32_t* pairs_ = nullptr;      // [keys / 2, lanes]
  float* products_ = nullptr;           // [32, lanes]
  std::uint16_t* half_rows_ = nullptr;  // [32, dim]
  float* pair_rows_ = nullptr;          // [16, dim]
  float* values_ = nullptr;             // [value_dim / 8, keys, 8]
#endif
  PairBuffers buffers_;
  std::optional<VectorRows> vector_;  // where none of the others
  std::optional<CarriedRows> carried_;
  RowPrefetch prefetch_;
  KeyRoom room_;
  std::vector<std::int64_t> tile_in_slot_;  // numbers of packed tiles of keys, by where they are
  std::vector<bool> finite_;                // whether V of them is, where it was looked at
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
