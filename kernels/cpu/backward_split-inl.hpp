// The five products of the backward pass of f32 and f16 on the tile unit, from parts of numbers.
#if defined(ANNULUS_CPU_BACKWARD_SPLIT_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_BACKWARD_SPLIT_INL
#undef ANNULUS_CPU_BACKWARD_SPLIT_INL
#else
#define ANNULUS_CPU_BACKWARD_SPLIT_INL
#endif

#include <algorithm>
#include <bitset>
#include <cmath>
#include <cstdint>
#include <vector>

#include "hwy/highway.h"
#include "kernels/attention.hpp"
#include "kernels/cpu/gradient_tile-inl.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/cpu/scratch.hpp"
#include "kernels/cpu/split_products-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Queries of a tile of the backward pass.
inline std::int64_t backward_lanes(const AttentionProblem& problem) {
  return splits_on_amx(problem.q.dtype) ? 2 * kLanes : kTileLanes;
}

#if ANNULUS_AMX

/// K and V of a chunk of keys, Q and dO of a tile of queries, P and dS between them, all in parts.
/// Rows that do not split are zeros here; the pairs that they are part of are taken one by one.
class BackwardSplit {
 public:
  /// Rows in f32 of a tile of queries, and where their gradients go.
  struct Rows {
    const float* q = nullptr;  // [lanes, k_stride]
    const float* grad_o = nullptr;
    float* dq = nullptr;  // [head_dim, lanes]
    float* dk = nullptr;  // [keys, k_stride]
    float* dv = nullptr;
    std::int64_t k_stride = 0;
    std::int64_t v_stride = 0;
  };

  BackwardSplit(const AttentionProblem& problem, const RowBlock& block, std::int64_t chunk_keys,
                const Rows& rows, Scratch& scratch)
      : problem_(problem),
        block_(block),
        rows_(rows),
        head_dim_(problem.head_dim()),
        value_dim_(problem.value_dim()),
        k_bytes_(row_bytes(head_dim_)),
        v_bytes_(row_bytes(value_dim_)),
        column_bytes_(chunk_keys / kAmxDepth * kSplitStepBytes),
        odd_k_(static_cast<std::size_t>(chunk_keys)),
        odd_v_(static_cast<std::size_t>(chunk_keys)) {
    const auto bytes = [&](std::int64_t count) {
      return reinterpret_cast<char*>(scratch.take(count / 4));
    };
    k_ = bytes(chunk_keys / kAmxRows * k_bytes_);
    v_ = bytes(chunk_keys / kAmxRows * v_bytes_);
    k_columns_ = bytes(column_tiles(head_dim_) * column_bytes_);
    for (char** left : {&p_, &ds_}) *left = bytes(kKeyTile / kAmxRows * kSplitStepBytes);
    ds_right_ = bytes(2 * kRightBytes);
    q_ = bytes(2 * k_bytes_);
    grad_o_ = bytes(2 * v_bytes_);
    q_rows_ = bytes(column_tiles(head_dim_) * kSplitStepBytes);
    grad_o_rows_ = bytes(column_tiles(value_dim_) * kSplitStepBytes);
    for (float*& product : products_) product = scratch.take(2 * kAmxRows * kSplitLanes);
    padded_ = scratch.take(kAmxDepth * depth(std::max(head_dim_, value_dim_)));
    row_ = scratch.take(depth(std::max(head_dim_, value_dim_)));
  }

  static std::int64_t floats(const AttentionProblem& problem, std::int64_t chunk_keys) {
    const std::int64_t k_bytes = row_bytes(problem.head_dim());
    const std::int64_t v_bytes = row_bytes(problem.value_dim());
    const std::int64_t k_tiles = column_tiles(problem.head_dim());
    const std::int64_t v_tiles = column_tiles(problem.value_dim());
    const std::int64_t keys = chunk_keys / kAmxRows * (k_bytes + v_bytes) +
                              k_tiles * chunk_keys / kAmxDepth * kSplitStepBytes;
    const std::int64_t pairs = 2 * kKeyTile / kAmxRows * kSplitStepBytes + 2 * kRightBytes;
    const std::int64_t queries = 2 * (k_bytes + v_bytes) + (k_tiles + v_tiles) * kSplitStepBytes;
    return (keys + pairs + queries) / 4 + 4 * kAmxRows * kSplitLanes +
           (kAmxDepth + 1) * depth(std::max(problem.head_dim(), problem.value_dim())) + 14 * 32;
  }

  void load_keys() {
    for (std::int64_t first = 0; first < block_.keys.size(); first += kAmxDepth) {
      for (std::int64_t i = first; i < first + kAmxDepth; ++i) {
        odd_v_[static_cast<std::size_t>(i)] = !load_key(problem_.v, i, padded_);
        store_split_row(padded_, depth(value_dim_), i, v_);
      }
      for (std::int64_t i = first; i < first + kAmxDepth; ++i) {
        float* row = padded_ + (i - first) * depth(head_dim_);
        odd_k_[static_cast<std::size_t>(i)] = !load_key(problem_.k, i, row);
        store_split_row(row, depth(head_dim_), i, k_);
      }
      store_split_columns(padded_, depth(head_dim_), round_up(head_dim_, kAmxRows), column_bytes_,
                          k_columns_ + first / kAmxDepth * kSplitStepBytes);
    }
  }

  /// The first `count` lanes are queries. K·Qᵀ is wanted with Q negated where the scale is
  /// negative.
  void load_queries(std::int64_t count) {
    odd_lanes_ = 0;
    load_rows(rows_.grad_o, rows_.v_stride, value_dim_, count, false, grad_o_, grad_o_rows_);
    load_rows(rows_.q, rows_.k_stride, head_dim_, count, problem_.scale < 0.0F, q_, q_rows_);
  }

  /// p ← K·Qᵀ and ds ← V·dOᵀ, [keys, lanes], for keys from `first` of the chunk on.
  void multiply_queries(std::int64_t vectors, std::int64_t first, std::int64_t keys, float* p,
                        float* ds, RowPrefetch& prefetch) {
    NoWork none;
    for (std::int64_t key = 0; key < keys; key += 2 * kAmxRows) {
      const std::int64_t tile = (first + key) / kAmxRows;
      split_product(2, vectors, k_bytes_ / kSplitStepBytes, {k_ + tile * k_bytes_, k_bytes_},
                    {q_, k_bytes_}, p + key * kTileLanes, kTileLanes, none);
      prefetch.step();
      split_product(2, vectors, v_bytes_ / kSplitStepBytes, {v_ + tile * v_bytes_, v_bytes_},
                    {grad_o_, v_bytes_}, ds + key * kTileLanes, kTileLanes, none);
      prefetch.step();
    }
    replace_products(vectors, first, keys, p, ds);
  }

  /// dV += P·dO, dK += dS·Q, dQᵀ += Kᵀ·dSᵀ. Keys that weigh nothing have zeros.
  void add_products(std::int64_t count, std::int64_t first, std::int64_t keys, float* p, float* ds,
                    bool wants_grad_q) {
    const std::int64_t vectors = (count + kLanes - 1) / kLanes;
    if (has_odd_pairs(vectors, first, keys, p, ds)) take_odd_pairs(count, first, keys, p, ds);
    store_left(keys, vectors, p, p_);
    store_left(keys, vectors, ds, ds_);
    add_to_keys(keys, p_, grad_o_rows_, value_dim_, rows_.v_stride,
                rows_.dv + first * rows_.v_stride);
    add_to_keys(keys, ds_, q_rows_, head_dim_, rows_.k_stride, rows_.dk + first * rows_.k_stride);
    if (wants_grad_q) add_to_queries(vectors, first, keys, ds);
  }

 private:
  // dS of 16 lanes as right operands: a step for each 32 keys.
  static constexpr std::int64_t kRightBytes = kKeyTile / kAmxDepth * kSplitStepBytes;

  static std::int64_t depth(std::int64_t dim) { return round_up(dim, kAmxDepth); }
  // Parts of 16 rows.
  static std::int64_t row_bytes(std::int64_t dim) {
    return depth(dim) / kAmxDepth * kSplitStepBytes;
  }
  static std::int64_t column_tiles(std::int64_t dim) { return (dim + kAmxRows - 1) / kAmxRows; }

  // A row with zeros to a multiple of 32; all zeros, and false, where it does not split.
  static bool pad(std::int64_t dim, float* row) {
    std::fill(row + dim, row + depth(dim), 0.0F);
    if (splits(row, depth(dim))) return true;
    std::fill_n(row, depth(dim), 0.0F);
    return false;
  }

  void load_tensor_row(const ConstTensorView& view, std::int64_t i, float* to) const {
    load_row(view.data, view.dtype,
             row_offset(view, block_.batch, block_.keys.begin + i, block_.kv_head), view.shape[3],
             to);
  }

  bool load_key(const ConstTensorView& view, std::int64_t i, float* to) const {
    if (i >= block_.keys.size()) {
      std::fill_n(to, depth(view.shape[3]), 0.0F);
      return true;
    }
    load_tensor_row(view, i, to);
    return pad(view.shape[3], to);
  }

  void load_rows(const float* from, std::int64_t stride, std::int64_t dim, std::int64_t count,
                 bool negate, char* by_dim, char* by_lane) {
    const std::int64_t padded = depth(dim);
    for (std::int64_t lane = 0; lane < kSplitLanes; ++lane) {
      float* row = padded_ + lane * padded;
      if (lane >= count) {
        std::fill_n(row, padded, 0.0F);
        continue;
      }
      std::copy_n(from + lane * stride, dim, row);
      if (!pad(dim, row)) odd_lanes_ |= 1U << lane;
    }
    for (std::int64_t column = 0; column < dim; column += kAmxColumns) {
      char* to = by_lane + column / kAmxColumns * kSplitStepBytes;
      for (std::int64_t lane = 0; lane < kSplitLanes; lane += 2) {
        const float* at = padded_ + lane * padded + column;
        store_split_pairs(_mm512_loadu_ps(at), _mm512_loadu_ps(at + padded), to + lane / 2 * 64);
      }
    }
    if (negate) {
      for (std::int64_t i = 0; i < kSplitLanes * padded; ++i) padded_[i] = -padded_[i];
    }
    for (std::int64_t v = 0; v < 2; ++v) {
      store_split_right(padded_ + v * kLanes * padded, padded, padded, by_dim + v * row_bytes(dim));
    }
  }

  bool odd_key(std::int64_t key) const {
    const auto i = static_cast<std::size_t>(key);
    return odd_k_[i] || odd_v_[i];
  }

  bool any_odd_key(std::int64_t first, std::int64_t keys) const {
    for (std::int64_t key = first; key < first + keys; ++key) {
      if (odd_key(key)) return true;
    }
    return false;
  }

  static float dot(const float* x, const float* y, std::int64_t n) {
    float sum = 0.0F;
    for (std::int64_t i = 0; i < n; ++i) sum = std::fma(x[i], y[i], sum);
    return sum;
  }

  // The products of keys and queries that do not split.
  void replace_products(std::int64_t vectors, std::int64_t first, std::int64_t keys, float* p,
                        float* ds) {
    if (odd_lanes_ == 0 && !any_odd_key(first, keys)) return;
    const std::int64_t last = std::min(first + keys, block_.keys.size());
    for (std::int64_t key = first; key < last; ++key) {
      const std::uint32_t lanes = odd_key(key) ? ~0U : odd_lanes_;
      if (lanes == 0) continue;
      const std::int64_t at = (key - first) * kTileLanes;
      load_tensor_row(problem_.k, key, row_);
      for (std::int64_t lane = 0; lane < vectors * kLanes; ++lane) {
        if ((lanes >> lane & 1U) == 0) continue;
        const float product = dot(row_, rows_.q + lane * rows_.k_stride, head_dim_);
        p[at + lane] = problem_.scale < 0.0F ? -product : product;
      }
      load_tensor_row(problem_.v, key, row_);
      for (std::int64_t lane = 0; lane < vectors * kLanes; ++lane) {
        if ((lanes >> lane & 1U) == 0) continue;
        ds[at + lane] = dot(row_, rows_.grad_o + lane * rows_.v_stride, value_dim_);
      }
    }
  }

  // Whether a weight and its gradient are finite, and far enough from the largest number.
  static bool pair_splits(float p, float ds) {
    return std::fabs(p) < 0x1p126F && std::fabs(ds) < 0x1p126F;
  }

  bool has_odd_pairs(std::int64_t vectors, std::int64_t first, std::int64_t keys, const float* p,
                     const float* ds) const {
    if (odd_lanes_ != 0 || any_odd_key(first, keys)) return true;
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (std::int64_t key = 0; key < keys; ++key) {
      for (std::int64_t v = 0; v < vectors; ++v) {
        const std::int64_t at = key * kTileLanes + v * kLanes;
        for (const float* tile : {p, ds}) {
          const __m512i bits = _mm512_load_si512(tile + at);
          largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
        }
      }
    }
    return _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32((127 + 126) << 23)) != 0;
  }

  // Adds what pairs give that do not split, or whose rows do not, and clears them for the products.
  void take_odd_pairs(std::int64_t count, std::int64_t first, std::int64_t keys, float* p,
                      float* ds) {
    const std::int64_t last = std::min(first + keys, block_.keys.size());
    for (std::int64_t key = first; key < last; ++key) {
      load_tensor_row(problem_.k, key, row_);
      for (std::int64_t lane = 0; lane < count; ++lane) {
        float& weight = p[(key - first) * kTileLanes + lane];
        float& grad = ds[(key - first) * kTileLanes + lane];
        if (!odd_key(key) && (odd_lanes_ >> lane & 1U) == 0 && pair_splits(weight, grad)) continue;
        if (weight != 0.0F) {
          add_scaled(rows_.grad_o + lane * rows_.v_stride, weight, value_dim_,
                     rows_.dv + key * rows_.v_stride);
        }
        if (grad != 0.0F) {
          add_scaled(rows_.q + lane * rows_.k_stride, grad, head_dim_,
                     rows_.dk + key * rows_.k_stride);
          for (std::int64_t d = 0; d < head_dim_; ++d) {
            rows_.dq[d * kTileLanes + lane] += grad * row_[d];
          }
        }
        weight = 0.0F;
        grad = 0.0F;
      }
    }
  }

  // Rows [keys, lanes] as left operands of a product over lanes.
  static void store_left(std::int64_t keys, std::int64_t vectors, const float* rows, char* left) {
    for (std::int64_t key = 0; key < keys; ++key) {
      const float* at = rows + key * kTileLanes;
      const __m512 second = vectors > 1 ? _mm512_load_ps(at + kLanes) : _mm512_setzero_ps();
      store_split_halves(_mm512_load_ps(at), second,
                         left + key / kAmxRows * kSplitStepBytes + key % kAmxRows * 64);
    }
  }

  // to[key, column] += left·right. The sums of one block join in the shadow of the next.
  void add_to_keys(std::int64_t keys, const char* left, const char* right, std::int64_t dim,
                   std::int64_t stride, float* to) {
    AddWork add;
    for (std::int64_t key = 0; key < keys; key += 2 * kAmxRows) {
      for (std::int64_t column = 0; column < dim; column += 2 * kAmxColumns) {
        const std::int64_t columns = dim - column > kAmxColumns ? 2 : 1;
        std::swap(products_[0], products_[1]);
        split_product(2, columns, 1, {left + key / kAmxRows * kSplitStepBytes, kSplitStepBytes},
                      {right + column / kAmxColumns * kSplitStepBytes, kSplitStepBytes},
                      products_[0], kSplitLanes, add);
        add.finish();
        add = {to + key * stride + column, stride, products_[0], 2 * kAmxRows, columns, 6};
      }
    }
    add.finish();
  }

  void add_to_queries(std::int64_t vectors, std::int64_t first, std::int64_t keys,
                      const float* ds) {
    store_split_weights(keys, vectors, ds, kRightBytes, ds_right_);
    const char* left = k_columns_ + first / kAmxDepth * kSplitStepBytes;
    AddWork add;
    for (std::int64_t row = 0; row < head_dim_; row += 2 * kAmxRows) {
      const std::int64_t rows = std::min(head_dim_ - row, 2 * kAmxRows);
      std::swap(products_[0], products_[1]);
      split_product(column_tiles(rows), vectors, keys / kAmxDepth,
                    {left + row / kAmxRows * column_bytes_, column_bytes_},
                    {ds_right_, kRightBytes}, products_[0], kSplitLanes, add);
      add.finish();
      add = {rows_.dq + row * kTileLanes, kTileLanes, products_[0], rows, vectors, 2};
    }
    add.finish();
  }

  const AttentionProblem& problem_;
  const RowBlock& block_;
  Rows rows_;
  std::int64_t head_dim_;
  std::int64_t value_dim_;
  std::int64_t k_bytes_;
  std::int64_t v_bytes_;
  std::int64_t column_bytes_;
  std::vector<bool> odd_k_;  // keys that do not split
  std::vector<bool> odd_v_;
  std::uint32_t odd_lanes_ = 0;
  // Operands [row or column tiles, steps, 3 parts, 1 KB]
  char* k_ = nullptr;            // left, over head_dim
  char* v_ = nullptr;            // left, over value_dim
  char* k_columns_ = nullptr;    // left, over keys
  char* p_ = nullptr;            // left, over lanes
  char* ds_ = nullptr;           // left, over lanes
  char* ds_right_ = nullptr;     // right, over keys
  char* q_ = nullptr;            // right, over head_dim
  char* grad_o_ = nullptr;       // right, over value_dim
  char* q_rows_ = nullptr;       // right, over lanes
  char* grad_o_rows_ = nullptr;  // right, over lanes
  float* products_[2] = {};      // [32, 32 lanes]
  float* padded_ = nullptr;      // [32, dim]
  float* row_ = nullptr;         // [dim]
};

#endif  // ANNULUS_AMX

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_BACKWARD_SPLIT_INL
