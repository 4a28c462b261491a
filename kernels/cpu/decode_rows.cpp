#include "kernels/cpu/decode_rows.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/key_runs.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/decode_rows.cpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"
#include "kernels/cpu/decode_amx-inl.hpp"
#include "kernels/cpu/logits_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

// Keys of a tile. All KV heads read a tile before the next one is touched: heads lie next to each
// other in memory, so that each page is translated once and read whole.
constexpr std::int64_t kDecodeTile = 64;
// Lines of the next tile to ask for with each small step of this one: K and V of 128 columns in
// bf16 are 8 lines a key and head, and there are three steps.
constexpr int kLinesOfStep = 3;
// Scores of a row of keys, in whole vectors of any target.
constexpr std::int64_t kScoreStride = kDecodeTile;

// The rows of one KV head: heads of its group × queries.
struct HeadRows {
  RowBlock block;
  TileRows rows;
  float* q = nullptr;  // [rows, head_dim], scaled; on the tile unit its right operands, not scaled
  float* o = nullptr;  // [rows, value_dim]
  float max[kMostDecodeRows];
  float sum[kMostDecodeRows];
};

// Here lanes are elements of head_dim: with one query to a KV head most lanes would idle otherwise.
class DecodeRows {
 public:
  DecodeRows(const AttentionProblem& problem, std::int64_t batch, Span keys, Scratch& scratch)
      : problem_(problem),
        batch_(batch),
        keys_(keys),
        k_stride_(round_up(problem.head_dim(), kLanesOrEight)),
        v_stride_(round_up(problem.value_dim(), kLanesOrEight)),
        amx_(uses_amx(problem.q.dtype)) {
    k_ = scratch.take(kDecodeTile * k_stride_);
    std::fill_n(k_, kDecodeTile * k_stride_, 0.0F);
    v_ = scratch.take(kDecodeTile * v_stride_);
    std::fill_n(v_, kDecodeTile * v_stride_, 0.0F);
#if ANNULUS_AMX
    if (amx_) {
      k_copy_ = reinterpret_cast<std::uint16_t*>(scratch.take(tile_floats(problem.head_dim())));
      pairs_ = reinterpret_cast<std::uint32_t*>(scratch.take(tile_floats(problem.value_dim())));
      products_ = scratch.take(tile_floats(kPairDepth));
    }
#endif
    p_ = scratch.take(kMostDecodeRows * kScoreStride);
    factor_ = scratch.take(kDecodeTile);
    for (std::int64_t kv_head = 0; kv_head < problem.kv_heads(); ++kv_head) {
      start_head(kv_head, scratch);
    }
  }

  static std::int64_t scratch_floats(const AttentionProblem& problem) {
    const std::int64_t k_stride = round_up(problem.head_dim(), kLanesOrEight);
    const std::int64_t v_stride = round_up(problem.value_dim(), kLanesOrEight);
    return kDecodeTile * (k_stride + v_stride) + kMostDecodeRows * kScoreStride + 192 +
           tile_floats(problem.head_dim()) + tile_floats(problem.value_dim()) +
           tile_floats(kPairDepth) +
           problem.kv_heads() * (Scratch::room_for(query_floats(problem)) +
                                 Scratch::room_for(kMostDecodeRows * v_stride));
  }

  void compute(const AttentionState& partial) {
    const AmxScope amx(amx_);
    for (std::int64_t key = keys_.begin; key < keys_.end; key += kDecodeTile) {
      const Span tile = intersect(keys_, {key, key + kDecodeTile});
      prefetch_tile(intersect(keys_, {tile.end, tile.end + kDecodeTile}));
      for (HeadRows& head : heads_) {
        for (const KeyRun& run :
             runs_.find(problem_.mask.of_batch(batch_), {0, problem_.seq_q()}, tile)) {
          add_run(head, run);
        }
      }
    }
    for (const HeadRows& head : heads_) write(head, partial);
  }

 private:
  static constexpr std::int64_t kLanesOrEight = kLanes > 8 ? kLanes : 8;
  static constexpr std::int64_t kPairDepth = 32;  // columns of the tile unit's operands

  // A tile of bf16 keys or values.
  static std::int64_t tile_floats(std::int64_t dim) {
    return Scratch::room_for(kDecodeTile * round_up(dim, kPairDepth) / 2);
  }

  static std::int64_t query_floats(const AttentionProblem& problem) {
    return kMostDecodeRows * round_up(problem.head_dim(), std::max(kLanesOrEight, kPairDepth));
  }

  void start_head(std::int64_t kv_head, Scratch& scratch) {
    HeadRows head;
    head.block = {batch_, kv_head, heads_of_kv_head(problem_, kv_head), {0, problem_.seq_q()}, {}};
    if (head.block.rows() == 0) return;
    head.rows = rows_of_tile(head.block, 0, std::min(kMostDecodeRows, kMaxLanes));
    head.q = scratch.take(query_floats(problem_));
    head.o = scratch.take(kMostDecodeRows * v_stride_);
    std::fill_n(head.q, query_floats(problem_), 0.0F);
    std::fill_n(head.o, kMostDecodeRows * v_stride_, 0.0F);
    for (std::int64_t r = 0; r < kMostDecodeRows; ++r) {
      head.max[r] = kMinusInfinity;
      head.sum[r] = 0.0F;
      const auto i = static_cast<std::size_t>(r);
      load_query(head, r, row_offset(problem_.q, batch_, head.rows.query[i], head.rows.head[i]));
    }
    heads_.push_back(head);
  }

  void load_query(const HeadRows& head, std::int64_t r, std::int64_t at) const {
#if ANNULUS_AMX
    if (amx_) {
      return pack_query_column(static_cast<const std::uint16_t*>(problem_.q.data) + at,
                               problem_.head_dim(), r, reinterpret_cast<std::uint32_t*>(head.q));
    }
#endif
    float* q = head.q + r * k_stride_;
    load_row(problem_.q.data, problem_.q.dtype, at, problem_.head_dim(), q);
    for (std::int64_t d = 0; d < problem_.head_dim(); ++d) q[d] *= problem_.scale;
  }

  void add_run(HeadRows& head, const KeyRun& run) {
#if ANNULUS_AMX
    if (amx_) return add_run_on_tiles(head, run);
#endif
    load_tile(problem_.k, head, run, k_stride_, k_);
    for (std::int64_t r = 0; r < head.rows.count; r += 4) score(head, run.keys.size(), r);
    float rescale[kMostDecodeRows] = {};
    weigh(head, run, rescale);
    add_rows_of_values(head, run, rescale);
  }

  // Scores in p_ become weights.
  void weigh(HeadRows& head, const KeyRun& run, float* rescale) {
    for (std::int64_t r = 0; r < head.rows.count; ++r) {
      float* s = p_ + r * kScoreStride;
      finish_logits(head, run, r, s);
      rescale[r] = softmax(run.keys.size(), s, head.max[r], head.sum[r]);
      if (problem_.dropout.probability > 0.0F) drop(head, run, r, s);
    }
  }

  void add_rows_of_values(HeadRows& head, const KeyRun& run, const float* rescale) {
    load_tile(problem_.v, head, run, v_stride_, v_);
    const bool finite =
        (run.full && !problem_.dense_mask) || all_finite(v_, run.keys.size() * v_stride_);
    for (std::int64_t r = 0; r < head.rows.count; r += 4) {
      float* o = head.o + r * v_stride_;
      if (finite) {
        add_values<Weights::all>(run.keys.size(), rescale + r, p_ + r * kScoreStride, o);
      } else {
        add_values<Weights::kept>(run.keys.size(), rescale + r, p_ + r * kScoreStride, o);
      }
    }
  }

#if ANNULUS_AMX
  HalfRows half_rows(const ConstTensorView& view, const HeadRows& head, const KeyRun& run) const {
    const std::int64_t at = row_offset(view, batch_, run.keys.begin, head.block.kv_head);
    return {static_cast<const std::uint16_t*>(view.data) + at, view.strides[1], run.keys.size(),
            view.shape[3]};
  }

  void add_run_on_tiles(HeadRows& head, const KeyRun& run) {
    const std::int64_t keys = run.keys.size();
    float rescale[kMostDecodeRows] = {};
    score_on_tiles(head, run);
    weigh(head, run, rescale);
    if (!pack_value_pairs(half_rows(problem_.v, head, run), pairs_, prefetch_)) {
      // The two parts of a weight would turn an infinite value into a NaN.
      return add_rows_of_values(head, run, rescale);
    }
    for (std::int64_t r = 0; r < head.rows.count; ++r) {
      prefetch_.lines<kLinesOfRow>();
      float* p = p_ + r * kScoreStride;
      std::fill(p + keys, p + kTileKeys, 0.0F);
      pack_weights(p, r, weights_);
    }
    amx_add_values(weights_, pairs_, keys, problem_.value_dim(), rescale, head.rows.count,
                   v_stride_, head.o, prefetch_);
  }

  // p_ ← scaled products.
  void score_on_tiles(const HeadRows& head, const KeyRun& run) {
    const std::int64_t keys = run.keys.size();
    const std::int64_t depth = amx_depth(problem_.head_dim());
    HalfRows k = half_rows(problem_.k, head, run);
    if (keys < kTileKeys || k.dim < depth) {
      copy_half_rows(k, k_copy_);
      k = {k_copy_, depth, keys, depth};
    }
    amx_scores(k.data, k.stride, depth, reinterpret_cast<const std::uint32_t*>(head.q), products_,
               prefetch_);
    const Floats d;
    const FloatVec scale = hn::Set(d, problem_.scale);
    transpose(products_, kAmxColumns, round_up(keys, 4), round_up(head.rows.count, 4), p_,
              kScoreStride);
    for (std::int64_t r = 0; r < head.rows.count; ++r) {
      for (float* s = p_ + r * kScoreStride; s < p_ + r * kScoreStride + keys; s += kLanes) {
        hn::Store(hn::Mul(hn::Load(d, s), scale), d, s);
      }
    }
  }
#endif

  // Asks for the next tile in the order of memory. Its lines are fetched while this tile is
  // computed on, so that memory and arithmetic overlap: the conversion to f32 finds them in L2.
  void prefetch_tile(Span tile) {
    for (const ConstTensorView* view : {&problem_.k, &problem_.v}) {
      const bool heads_adjacent = view->strides[2] == view->shape[3];
      if (heads_adjacent) {
        prefetch_.add(RowPrefetch::Order::last, *view, row_offset(*view, batch_, tile.begin, 0),
                      view->strides[1], view->shape[2] * view->shape[3], tile.size());
        continue;
      }
      for (std::int64_t head = 0; head < problem_.kv_heads(); ++head) {
        prefetch_.add(RowPrefetch::Order::last, *view, row_offset(*view, batch_, tile.begin, head),
                      view->strides[1], view->shape[3], tile.size());
      }
    }
  }

  void load_tile(const ConstTensorView& view, const HeadRows& head, const KeyRun& run,
                 std::int64_t stride, float* to) const {
    for (std::int64_t key = run.keys.begin; key < run.keys.end; ++key) {
      load_row(view.data, view.dtype, row_offset(view, batch_, key, head.block.kv_head),
               view.shape[3], to + (key - run.keys.begin) * stride);
    }
  }

  // Four rows of scores: one pass over the keys of the run.
  void score(const HeadRows& head, std::int64_t keys, std::int64_t first) {
    const Floats d;
    const float* q = head.q + first * k_stride_;
    float* s = p_ + first * kScoreStride;
    for (std::int64_t key = 0; key < keys; ++key) {
      prefetch_.step();
      FloatVec sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
      for (std::int64_t i = 0; i < k_stride_; i += kLanes) {
        const FloatVec k = hn::Load(d, k_ + key * k_stride_ + i);
        HWY_UNROLL(4)
        for (int r = 0; r < 4; ++r) {
          sum[r] = hn::MulAdd(k, hn::Load(d, q + r * k_stride_ + i), sum[r]);
        }
      }
      HWY_UNROLL(4)
      for (int r = 0; r < 4; ++r) {
        s[r * kScoreStride + key] = hn::GetLane(hn::SumOfLanes(d, sum[r]));
      }
    }
  }

  // Soft cap, bias and masks of one row of scores.
  void finish_logits(const HeadRows& head, const KeyRun& run, std::int64_t r, float* s) {
    const std::int64_t keys = run.keys.size();
    const auto i = static_cast<std::size_t>(r);
    const std::int64_t query = head.rows.query[i];
    if (problem_.soft_cap > 0.0F) {
      const Floats d;
      const FloatVec cap = hn::Set(d, problem_.soft_cap);
      const FloatVec inverse = hn::Set(d, 1.0F / problem_.soft_cap);
      for (std::int64_t k = 0; k < keys; k += kLanes) {
        hn::StoreU(hn::Mul(cap, tanh(d, hn::Mul(hn::LoadU(d, s + k), inverse))), d, s + k);
      }
    }
    if (problem_.bias) {
      load_pairs(problem_.bias, head, run, r);
      for (std::int64_t k = 0; k < keys; ++k) s[k] += factor_[k];
    }
    if (problem_.dense_mask) {
      load_pairs(problem_.dense_mask, head, run, r);
      for (std::int64_t k = 0; k < keys; ++k) s[k] = factor_[k] == 0.0F ? kMinusInfinity : s[k];
    }
    if (run.full) return;
    std::fill_n(factor_, keys, 0.0F);
    for (const Slice& slice : run.slices) {
      const Span kept = keys_in_run(run, slice, query);
      std::fill_n(factor_ + kept.begin, kept.size(), 1.0F);
    }
    for (std::int64_t k = 0; k < keys; ++k) s[k] = factor_[k] == 0.0F ? kMinusInfinity : s[k];
  }

  void load_pairs(const ConstTensorView& view, const HeadRows& head, const KeyRun& run,
                  std::int64_t r) {
    const auto i = static_cast<std::size_t>(r);
    const std::int64_t at = pair_offset(view, batch_, head.rows.head[i], head.rows.query[i]);
    load_pair_row(view, at + run.keys.begin * view.strides[3], run.keys.size(), factor_);
  }

  void drop(const HeadRows& head, const KeyRun& run, std::int64_t r, float* p) const {
    const auto i = static_cast<std::size_t>(r);
    const Dropout& dropout = problem_.dropout;
    const float factor = 1.0F / (1.0F - dropout.probability);
    for (std::int64_t k = 0; k < run.keys.size(); ++k) {
      const bool kept =
          dropout_keeps(dropout.seed, dropout_threshold(dropout.probability),
                        batch_ + dropout.batch_begin, head.rows.head[i] + dropout.q_head_begin,
                        global_position(dropout.q_positions, head.rows.query[i]),
                        global_position(dropout.k_positions, run.keys.begin + k));
      p[k] *= kept ? factor : 0.0F;
    }
  }

  // s ← exp(s − max) for one row; the factor that its accumulator needs.
  static float softmax(std::int64_t keys, float* s, float& max, float& sum) {
    const Floats d;
    for (std::int64_t k = keys; k < round_up(keys, kLanes); ++k) s[k] = kMinusInfinity;
    FloatVec largest = hn::Set(d, max);
    for (std::int64_t k = 0; k < keys; k += kLanes) largest = hn::Max(largest, hn::Load(d, s + k));
    const FloatVec new_max = hn::MaxOfLanes(d, largest);
    const FloatVec base2 = base2_max(new_max);
    const FloatVec log2e = hn::Set(d, kLog2E);
    FloatVec total = hn::Zero(d);
    for (std::int64_t k = 0; k < keys; k += kLanes) {
      const FloatVec p = exp2(d, hn::MulSub(hn::Load(d, s + k), log2e, base2));
      total = hn::Add(total, p);
      hn::Store(p, d, s + k);
    }
    const float rescale = hn::GetLane(exp2(d, hn::Sub(hn::Mul(hn::Set(d, max), log2e), base2)));
    max = hn::GetLane(new_max);
    sum = sum * rescale + hn::GetLane(hn::SumOfLanes(d, total));
    return rescale;
  }

  // Whether terms of weight 0 are left out: 0 times an infinite or NaN value is not 0.
  enum class Weights : std::uint8_t { all, kept };

  // o ← o·rescale + p·V for four rows.
  template <Weights kWeights>
  void add_values(std::int64_t keys, const float* rescale, const float* p, float* o) {
    // Four rows by four columns of sums, where the registers hold them.
    constexpr int kColumns = kPanelRows == 8 ? 4 : 2;
    std::int64_t column = 0;
    for (; column + kColumns * kLanes <= v_stride_; column += kColumns * kLanes) {
      add_columns<kColumns, kWeights>(keys, rescale, p, v_ + column, o + column);
    }
    for (; column < v_stride_; column += kLanes) {
      add_columns<1, kWeights>(keys, rescale, p, v_ + column, o + column);
    }
  }

  template <int kColumns, Weights kWeights>
  HWY_INLINE void add_columns(std::int64_t keys, const float* rescale, const float* p,
                              const float* v, float* o) {
    const Floats d;
    FloatVec sum[4][kColumns];  // apart from o, beside which small terms would be rounded away
    HWY_UNROLL(4)
    for (int r = 0; r < 4; ++r) {
      HWY_UNROLL(4)
      for (int c = 0; c < kColumns; ++c) sum[r][c] = hn::Zero(d);
    }
    for (std::int64_t key = 0; key < keys; ++key, v += v_stride_) {
      prefetch_.step();
      FloatVec row[kColumns];
      HWY_UNROLL(4)
      for (int c = 0; c < kColumns; ++c) row[c] = hn::Load(d, v + c * kLanes);
      HWY_UNROLL(4)
      for (int r = 0; r < 4; ++r) {
        if (kWeights == Weights::kept && p[r * kScoreStride + key] == 0.0F) continue;
        const FloatVec weight = hn::Set(d, p[r * kScoreStride + key]);
        HWY_UNROLL(4)
        for (int c = 0; c < kColumns; ++c) sum[r][c] = hn::MulAdd(weight, row[c], sum[r][c]);
      }
    }
    HWY_UNROLL(4)
    for (int r = 0; r < 4; ++r) {
      const FloatVec factor = hn::Set(d, rescale[r]);
      HWY_UNROLL(4)
      for (int c = 0; c < kColumns; ++c) {
        float* at = o + r * v_stride_ + c * kLanes;
        hn::Store(hn::MulAdd(factor, hn::Load(d, at), sum[r][c]), d, at);
      }
    }
  }

  void write(const HeadRows& head, const AttentionState& partial) const {
    for (std::int64_t r = 0; r < head.rows.count; ++r) {
      const auto i = static_cast<std::size_t>(r);
      const std::int64_t h = head.rows.head[i];
      const std::int64_t q = head.rows.query[i];
      static_cast<float*>(partial.row_max.data)[statistic_offset(partial.row_max, batch_, h, q)] =
          head.max[r];
      static_cast<float*>(partial.row_sum.data)[statistic_offset(partial.row_sum, batch_, h, q)] =
          head.sum[r];
      store_row(head.o + r * v_stride_, problem_.value_dim(), partial.accumulator.data, DType::f32,
                row_offset(partial.accumulator, batch_, q, h));
    }
  }

  const AttentionProblem& problem_;
  std::int64_t batch_;
  Span keys_;
  std::int64_t k_stride_;
  std::int64_t v_stride_;
  float* k_ = nullptr;       // [keys, head_dim], zeros up to a vector
  float* v_ = nullptr;       // [keys, value_dim], zeros up to a vector
  float* p_ = nullptr;       // [rows, keys]
  float* factor_ = nullptr;  // [keys]
  bool amx_;
#if ANNULUS_AMX
  std::uint16_t* k_copy_ = nullptr;  // [keys, head_dim], where K cannot be read in place
  std::uint32_t* pairs_ = nullptr;   // [keys / 2, value_dim]
  float* products_ = nullptr;        // [keys, columns of a tile]
  WeightTiles weights_{};
#endif
  std::vector<HeadRows> heads_;
  KeyRuns runs_;
  RowPrefetch prefetch_{kLinesOfStep};
};

std::int64_t decode_scratch_on_target(const AttentionProblem& problem) {
  return DecodeRows::scratch_floats(problem);
}

void decode_rows_on_target(const AttentionProblem& problem, std::int64_t batch, Span keys,
                           const AttentionState& partial, Scratch& scratch) {
  DecodeRows(problem, batch, keys, scratch).compute(partial);
}

}  // namespace
}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus::kernels {

HWY_EXPORT(decode_scratch_on_target);
HWY_EXPORT(decode_rows_on_target);

std::int64_t decode_scratch(const AttentionProblem& problem) {
  return HWY_DYNAMIC_DISPATCH(decode_scratch_on_target)(problem);
}

void decode_rows(const AttentionProblem& problem, std::int64_t batch, Span keys,
                 const AttentionState& partial, Scratch& scratch) {
  HWY_DYNAMIC_DISPATCH(decode_rows_on_target)(problem, batch, keys, partial, scratch);
}

}  // namespace annulus::kernels
#endif  // HWY_ONCE
