// The forward pass of f32 and f16 on the tile unit: tiles of 32 queries, products of parts.
#if defined(ANNULUS_CPU_SPLIT_ROWS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_SPLIT_ROWS_INL
#undef ANNULUS_CPU_SPLIT_ROWS_INL
#else
#define ANNULUS_CPU_SPLIT_ROWS_INL
#endif

#include <algorithm>
#include <bitset>
#include <cstdint>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/forward_rows.hpp"
#include "kernels/cpu/logits_tile-inl.hpp"
#include "kernels/cpu/query_tile-inl.hpp"
#include "kernels/cpu/split_products-inl.hpp"

#if ANNULUS_AMX
HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// K and V of a chunk of keys as parts, and what tiles of queries do with them. Rows that do not
/// split (infinite, NaN, huge or tiny ones) are zeros to the tile unit, and their own products are
/// done in f32: no row's values change the bits of what they have no part in.
class SplitRows {
 public:
  SplitRows(const AttentionProblem& problem, const ForwardBlock& block, std::int64_t chunk_keys,
            Scratch& scratch, const TileWork& work)
      : problem_(problem),
        block_(block),
        work_(work),
        head_dim_(problem.head_dim()),
        value_dim_(problem.value_dim()),
        k_bytes_(tile_bytes(head_dim_)),
        odd_k_(static_cast<std::size_t>(chunk_keys / kKeyTile)),
        odd_v_(odd_k_.size()) {
    k_ = take_bytes(scratch, chunk_keys / kAmxRows * k_bytes_);
    v_ = take_bytes(scratch, chunk_keys / kKeyTile * value_tiles() * kColumnBytes);
    weights_ = take_bytes(scratch, 2 * kColumnBytes);
    other_p_ = scratch.take(kKeyTile * kTileLanes);
    products_ = scratch.take(2 * kAmxRows * kSplitLanes);
    other_products_ = scratch.take(2 * kAmxRows * kSplitLanes);
    rows_ = scratch.take(kAmxDepth * round_up(std::max(head_dim_, value_dim_), kAmxDepth));
  }

  static std::int64_t scratch_floats(const AttentionProblem& problem, std::int64_t chunk_keys) {
    const std::int64_t v_tiles = (problem.value_dim() + kAmxRows - 1) / kAmxRows;
    return (chunk_keys / kAmxRows * tile_bytes(problem.head_dim()) +
            (chunk_keys / kKeyTile * v_tiles + 2) * kColumnBytes) /
               4 +
           kKeyTile * kTileLanes + 4 * kAmxRows * kSplitLanes +
           kAmxDepth * round_up(std::max(problem.head_dim(), problem.value_dim()), kAmxDepth) +
           7 * 32;
  }

  /// Floats of the parts of a tile of queries.
  static std::int64_t query_floats(const AttentionProblem& problem) {
    return 2 * tile_bytes(problem.head_dim()) / 4;
  }

  void load_queries(QueryTile& tile) {
    tile.odd = 0;
    tile.has_q = false;
    for (std::int64_t v = 0; v < tile.vectors; ++v) {
      for (std::int64_t i = 0; i < kLanes; ++i) {
        const std::int64_t lane = v * kLanes + i;
        if (load_query(tile, lane, depth(head_dim_), rows_ + i * depth(head_dim_))) continue;
        tile.odd |= 1U << lane;
      }
      store_split_right(rows_, depth(head_dim_), depth(head_dim_), tile.parts + v * k_bytes_);
    }
  }

  void pack(Span keys, std::size_t index) {
    char* k = k_of(index, 0);
    char* v = v_of(index, 0);
    odd_k_[index].reset();
    odd_v_[index].reset();
    const std::int64_t k_depth = depth(head_dim_);
    const std::int64_t v_depth = round_up(value_dim_, kAmxRows);
    for (std::int64_t first = 0; first < kKeyTile; first += kAmxDepth) {
      for (std::int64_t i = first; i < first + kAmxDepth; ++i) {
        const auto bit = static_cast<std::size_t>(i);
        odd_k_[index][bit] = !load_key(problem_.k, keys, i, k_depth, rows_);
        store_split_row(rows_, k_depth, i, k);
      }
      for (std::int64_t i = 0; i < kAmxDepth; ++i) {
        const auto bit = static_cast<std::size_t>(first + i);
        odd_v_[index][bit] = !load_key(problem_.v, keys, first + i, v_depth, rows_ + i * v_depth);
      }
      store_split_columns(rows_, v_depth, v_depth, kColumnBytes,
                          v + first / kAmxDepth * kSplitStepBytes);
    }
  }

  /// One tile of Sᵀ = K·Qᵀ, its softmax, and Oᵀ = Oᵀ·rescale + Vᵀ·Pᵀ, in steps of 32 keys of the
  /// tile around the run; weights outside it are 0. The exponentials wait for the next call, which
  /// computes them in the shadow of its own product, and the values follow.
  void add_run(QueryTile& tile, const KeyRun& run, std::int64_t first_key, std::size_t index) {
    Job job;
    job.tile = &tile;
    job.index = index;
    job.keys = run.keys;
    job.first = first_key;
    job.before = first_key % kAmxDepth;
    job.all = round_up(job.before + run.keys.size(), kAmxDepth);
    job.p = jobs_++ % 2 == 0 ? work_.p : other_p_;
    if (job_.waits) {
      const std::int64_t calls =
          NoWork::kCallsOfStep * k_bytes_ / kSplitStepBytes * job.all / kAmxDepth;
      weights_work_.pairs_of_call = (weights_work_.pairs + calls - 1) / calls;
      multiply_keys(job, weights_work_);
    } else {
      NoWork none;
      multiply_keys(job, none);
    }
    finish();
    begin(job, run);
    job_ = job;
  }

  /// What the last call left.
  void finish() {
    if (job_.tile == nullptr) return;
    if (job_.waits) weights_work_.finish(job_.tile->state);
    add_values(job_);
    if (odd_v_[job_.index].any()) add_odd_values(job_);
    job_ = {};
  }

 private:
  // Parts of 16 columns of V, or of P: a step for each 32 keys of a tile.
  static constexpr std::int64_t kColumnBytes = kKeyTile / kAmxDepth * kSplitStepBytes;

  static std::int64_t depth(std::int64_t dim) { return round_up(dim, kAmxDepth); }
  // Parts of 16 rows of K or Q.
  static std::int64_t tile_bytes(std::int64_t dim) {
    return depth(dim) / kAmxDepth * kSplitStepBytes;
  }
  std::int64_t value_tiles() const { return (value_dim_ + kAmxRows - 1) / kAmxRows; }

  static char* take_bytes(Scratch& scratch, std::int64_t bytes) {
    return reinterpret_cast<char*>(scratch.take(bytes / 4));
  }

  char* k_of(std::size_t index, std::int64_t key) const {
    return k_ + (static_cast<std::int64_t>(index) * kKeyTile + key) / kAmxRows * k_bytes_;
  }
  char* v_of(std::size_t index, std::int64_t key) const {
    return v_ + static_cast<std::int64_t>(index) * value_tiles() * kColumnBytes +
           key / kAmxDepth * kSplitStepBytes;
  }

  // A row with zeros up to `padded` elements; all zeros, and false, where it does not split.
  static bool load_split_row(const ConstTensorView& view, std::int64_t at, std::int64_t padded,
                             float* to) {
    load_row(view.data, view.dtype, at, view.shape[3], to);
    std::fill(to + view.shape[3], to + padded, 0.0F);
    if (splits(to, padded)) return true;
    std::fill_n(to, padded, 0.0F);
    return false;
  }

  // Also negated where the scale is negative.
  bool load_query(const QueryTile& tile, std::int64_t lane, std::int64_t padded, float* to) const {
    const auto i = static_cast<std::size_t>(lane);
    const bool fits = load_split_row(
        problem_.q,
        row_offset(problem_.q, block_.rows.batch, tile.rows.query[i], tile.rows.head[i]), padded,
        to);
    if (problem_.scale < 0.0F) {
      for (std::int64_t d = 0; d < padded; ++d) to[d] = -to[d];
    }
    return fits;
  }

  bool load_key(const ConstTensorView& view, Span keys, std::int64_t i, std::int64_t padded,
                float* to) const {
    const std::int64_t key = keys.begin + i;
    if (key >= keys.end) {
      std::fill_n(to, padded, 0.0F);
      return true;
    }
    const std::int64_t at = row_offset(view, block_.rows.batch, key, block_.rows.kv_head);
    if (key + kRowsAhead < keys.end) prefetch_row(view, at + kRowsAhead * view.strides[1]);
    return load_split_row(view, at, padded, to);
  }

  // Some keys of a key tile for a tile of queries: products, then weights.
  struct Job {
    QueryTile* tile = nullptr;
    std::size_t index = 0;
    Span keys;
    std::int64_t first = 0;   // key of the run in its tile
    std::int64_t before = 0;  // keys of the product before it
    std::int64_t all = 0;     // keys of the product
    float* p = nullptr;       // [keys of the product, lanes]
    bool waits = false;       // for its exponentials
  };

  template <typename Work>
  void multiply_keys(const Job& job, Work& shadow) {
    for (std::int64_t key = 0; key < job.all; key += 2 * kAmxRows) {
      split_product(2, job.tile->vectors, k_bytes_ / kSplitStepBytes,
                    {k_of(job.index, job.first - job.before + key), k_bytes_},
                    {job.tile->parts, k_bytes_}, job.p + key * kTileLanes, kTileLanes, shadow);
      work_.prefetch->step();
    }
  }

  void begin(Job& job, const KeyRun& run) {
    QueryTile& tile = *job.tile;
    const std::int64_t keys = run.keys.size();
    const float factor = logit_factor(problem_);
    float* p = job.p + job.before * kTileLanes;
    if (tile.odd != 0 || odd_k_[job.index].any()) replace_products(job, p);
    products_to_logits({problem_, block_.rows.batch, tile.rows, tile.vectors, run}, work_.buffers,
                       p);
    const bool dropout = problem_.dropout.probability > 0.0F;
    job.waits = !dropout && !odd_v_[job.index].any() && tile.vectors == 2;
    fill_outside(job, job.waits ? kMinusInfinity : 0.0F);
    if (job.waits) {
      begin_softmax<2>(keys, factor, p, tile.state, work_.rescale);
      weights_work_ = WeightWork(job.all, factor, job.p, tile.state, kColumnBytes, weights_);
      return;
    }
    softmax_tile(keys, tile.vectors, factor, p, tile.state, work_.rescale);
    if (dropout) drop_weights(job, p);
    store_split_weights(job.all, tile.vectors, job.p, kColumnBytes, weights_);
  }

  static void fill_outside(const Job& job, float value) {
    std::fill_n(job.p, job.before * kTileLanes, value);
    std::fill(job.p + (job.before + job.keys.size()) * kTileLanes, job.p + job.all * kTileLanes,
              value);
  }

  void drop_weights(const Job& job, float* p) const {
    load_dropout_tile(problem_.dropout, block_.rows.batch, job.tile->rows, job.tile->vectors,
                      job.keys, work_.buffers.factor);
    multiply_tile(job.keys.size(), job.tile->vectors, work_.buffers.factor, p);
  }

  void add_values(const Job& job) {
    const Floats d;
    const char* v = v_of(job.index, job.first - job.before);
    RescaleWork add;
    for (int n = 0; n < 2; ++n) add.rescale[n] = hn::Load(d, work_.rescale + n * kLanes);
    float* products = products_;
    for (std::int64_t row = 0; row < value_dim_; row += 2 * kAmxRows) {
      const std::int64_t rows = std::min(value_dim_ - row, 2 * kAmxRows);
      split_product((rows + kAmxRows - 1) / kAmxRows, job.tile->vectors, job.all / kAmxDepth,
                    {v + row / kAmxRows * kColumnBytes, kColumnBytes}, {weights_, kColumnBytes},
                    products, kSplitLanes, add);
      add.finish();
      add.o = job.tile->o + row * kTileLanes;
      add.product = products;
      add.rows = rows;
      products = products == products_ ? other_products_ : products_;
      work_.prefetch->step();
    }
    add.finish();
  }

  // Q of a tile in f32, [head_dim, lanes]: only for products that are done in f32.
  void load_plain_queries(QueryTile& tile) {
    for (std::int64_t lane = 0; lane < tile.vectors * kLanes; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      load_row(problem_.q.data, problem_.q.dtype,
               row_offset(problem_.q, block_.rows.batch, tile.rows.query[i], tile.rows.head[i]),
               head_dim_, rows_);
      for (std::int64_t d = 0; d < head_dim_; ++d) {
        tile.q[d * kTileLanes + lane] = problem_.scale < 0.0F ? -rows_[d] : rows_[d];
      }
    }
    tile.has_q = true;
  }

  // The products of keys or of queries that do not split.
  void replace_products(const Job& job, float* p) {
    const Floats d;
    QueryTile& tile = *job.tile;
    if (!tile.has_q) load_plain_queries(tile);
    for (std::int64_t i = 0; i < job.keys.size(); ++i) {
      const bool odd_key = odd_k_[job.index][static_cast<std::size_t>(job.first + i)];
      const std::uint32_t lanes = odd_key ? ~0U : tile.odd;
      if (lanes == 0) continue;
      load_row(problem_.k.data, problem_.k.dtype,
               row_offset(problem_.k, block_.rows.batch, job.keys.begin + i, block_.rows.kv_head),
               head_dim_, rows_);
      for (std::int64_t v = 0; v < tile.vectors; ++v) {
        FloatVec sum = hn::Zero(d);
        for (std::int64_t c = 0; c < head_dim_; ++c) {
          const FloatVec q = hn::Load(d, tile.q + c * kTileLanes + v * kLanes);
          sum = hn::MulAdd(hn::Set(d, rows_[c]), q, sum);
        }
        _mm512_mask_store_ps(p + i * kTileLanes + v * kLanes,
                             static_cast<__mmask16>(lanes >> (v * kLanes)), sum.raw);
      }
    }
  }

  // Values of keys that do not split, but for weights of 0.
  void add_odd_values(const Job& job) {
    const Floats d;
    const float* p = job.p + job.before * kTileLanes;
    for (std::int64_t i = 0; i < job.keys.size(); ++i) {
      if (!odd_v_[job.index][static_cast<std::size_t>(job.first + i)]) continue;
      load_row(problem_.v.data, problem_.v.dtype,
               row_offset(problem_.v, block_.rows.batch, job.keys.begin + i, block_.rows.kv_head),
               value_dim_, rows_);
      for_each_vector(value_dim_, job.tile->vectors, job.tile->o,
                      [&](std::int64_t column, std::int64_t v, float* at) HWY_ATTR {
                        const FloatVec weight = hn::Load(d, p + i * kTileLanes + v * kLanes);
                        const FloatVec o = hn::Load(d, at);
                        const FloatVec more = hn::MulAdd(hn::Set(d, rows_[column]), weight, o);
                        hn::Store(hn::IfThenElse(hn::Eq(weight, hn::Zero(d)), o, more), d, at);
                      });
    }
  }

  const AttentionProblem& problem_;
  const ForwardBlock& block_;
  TileWork work_;
  std::int64_t head_dim_;
  std::int64_t value_dim_;
  std::int64_t k_bytes_;
  std::vector<std::bitset<kKeyTile>> odd_k_;  // by key tile: keys that do not split
  std::vector<std::bitset<kKeyTile>> odd_v_;
  char* k_ = nullptr;          // [keys / 16, steps, 3 parts, 1 KB]
  char* v_ = nullptr;          // [key tiles, value_dim / 16, steps, 3 parts, 1 KB]
  char* weights_ = nullptr;    // [2 vectors, steps, 3 parts, 1 KB]
  float* other_p_ = nullptr;   // as work_.p: two tiles are under way
  float* products_ = nullptr;  // [32, 32 lanes]
  float* other_products_ = nullptr;
  float* rows_ = nullptr;    // [32, dim]
  Job job_;                  // under way
  WeightWork weights_work_;  // of it, where it waits
  std::int64_t jobs_ = 0;
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // ANNULUS_AMX

#endif  // ANNULUS_CPU_SPLIT_ROWS_INL
