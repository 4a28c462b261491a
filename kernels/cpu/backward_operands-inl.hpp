// Operands of the backward pass in bf16, in the order in which the tile unit takes them.
#if defined(ANNULUS_CPU_BACKWARD_OPERANDS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_BACKWARD_OPERANDS_INL
#undef ANNULUS_CPU_BACKWARD_OPERANDS_INL
#else
#define ANNULUS_CPU_BACKWARD_OPERANDS_INL
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/attention.hpp"
#include "kernels/cpu/amx_products-inl.hpp"
#include "kernels/cpu/row_block.hpp"
#include "kernels/cpu/scratch.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

#if ANNULUS_AMX

/// K and V of a chunk of keys, Q and dO of a tile of queries, and room for P and dS between them.
class BackwardOperands {
 public:
  BackwardOperands(const AttentionProblem& problem, std::int64_t chunk_keys, Scratch& scratch)
      : head_dim_(problem.head_dim()), value_dim_(problem.value_dim()), chunk_keys_(chunk_keys) {
    const std::int64_t depth = std::max(depth_of(head_dim_), depth_of(value_dim_));
    const auto bytes = [&](std::int64_t count) {
      return reinterpret_cast<char*>(scratch.take(count / 4));
    };
    k = bytes(chunk_keys * depth * 2);
    v = bytes(chunk_keys * depth * 2);
    k_columns = bytes(chunk_keys * depth * 2);
    p = bytes(kKeyTile * 128);
    ds = bytes(kKeyTile * 128);
    rows_ = reinterpret_cast<std::uint16_t*>(scratch.take(kAmxDepth * depth / 2));
    pair_rows_ = scratch.take(kAmxRows * depth);
    halves_ = scratch.take(kTileLanes * depth / 2);
    q = scratch.take(depth / 2 * kTileLanes);
    grad_o = scratch.take(depth / 2 * kTileLanes);
    for (std::uint32_t** right : {&q_rows, &grad_o_rows}) {
      *right = reinterpret_cast<std::uint32_t*>(
          scratch.take(round_up(depth, kTileLanes) / kTileLanes * kRightWords));
    }
    pairs = reinterpret_cast<std::uint32_t*>(scratch.take(kKeyTile / 2 * kTileLanes));
    products = scratch.take(2 * kAmxRows * kTileLanes);
  }

  static std::int64_t floats(const AttentionProblem& problem, std::int64_t chunk_keys) {
    const std::int64_t depth = round_up(std::max(problem.head_dim(), problem.value_dim()), 32);
    const std::int64_t right = round_up(depth, kTileLanes) * 32;
    return 3 * chunk_keys * depth / 2 + 2 * kKeyTile * 32 + 16 * depth * 2 +
           3 * kTileLanes * depth / 2 + 2 * right + kKeyTile / 2 * kTileLanes + 32 * kTileLanes +
           16 * 32;
  }

  static std::int64_t depth_of(std::int64_t dim) { return round_up(dim, kAmxDepth); }
  /// Of one row tile of left operands over a dim.
  static std::int64_t tile_bytes(std::int64_t dim) { return depth_of(dim) / kAmxDepth * kAmxBytes; }
  /// Of one row tile of K's columns, over the keys of a chunk.
  std::int64_t column_tile_bytes() const { return chunk_keys_ / kAmxDepth * kAmxBytes; }

  void load_keys(const AttentionProblem& problem, const RowBlock& block) {
    const std::int64_t depth = depth_of(head_dim_);
    for (std::int64_t first = 0; first < block.keys.size(); first += kAmxDepth) {
      for (std::int64_t i = 0; i < kAmxDepth; ++i) {
        load_key(problem.v, block, first + i, rows_);
        store_left_row(rows_, value_dim_, first + i, v);
      }
      for (std::int64_t i = 0; i < kAmxDepth; ++i) {
        std::uint16_t* row = rows_ + i * depth;
        load_key(problem.k, block, first + i, row);
        store_left_row(row, head_dim_, first + i, k);
      }
      store_left_columns(rows_, depth, head_dim_, chunk_keys_ / kAmxDepth, pair_rows_,
                         k_columns + first / kAmxDepth * kAmxBytes);
    }
  }

  /// From rows in f32 [lanes, stride], `count` of which are queries. K·Qᵀ is wanted with Q negated
  /// where the scale is negative.
  void load_queries(const float* query_rows, std::int64_t q_stride, const float* gradient_rows,
                    std::int64_t grad_o_stride, std::int64_t count, bool negate) {
    store_right_columns(query_rows, q_stride, depth_of(head_dim_), head_dim_,
                        negate ? 0x80000000U : 0, halves_, q);
    store_right_columns(gradient_rows, grad_o_stride, depth_of(value_dim_), value_dim_, 0, halves_,
                        grad_o);
    store_right_rows(query_rows, q_stride, count, round_up(head_dim_, 16), q_rows);
    store_right_rows(gradient_rows, grad_o_stride, count, round_up(value_dim_, 16), grad_o_rows);
  }

  char* k = nullptr;          // left, by rows
  char* v = nullptr;          // left, by rows
  char* k_columns = nullptr;  // left, by columns
  char* p = nullptr;          // left, by rows of keys
  char* ds = nullptr;
  float* q = nullptr;  // right, [head_dim / 2, lanes]
  float* grad_o = nullptr;
  std::uint32_t* q_rows = nullptr;  // right, [columns / 48, lanes / 2, 48]
  std::uint32_t* grad_o_rows = nullptr;
  std::uint32_t* pairs = nullptr;  // right, dS: [keys / 2, lanes]
  float* products = nullptr;       // [32, lanes]

 private:
  void load_key(const ConstTensorView& view, const RowBlock& block, std::int64_t i,
                std::uint16_t* to) const {
    if (i >= block.keys.size()) {
      std::fill_n(to, depth_of(view.shape[3]), std::uint16_t{0});
      return;
    }
    const std::int64_t at = row_offset(view, block.batch, block.keys.begin + i, block.kv_head);
    copy_half_row(static_cast<const std::uint16_t*>(view.data) + at, view.shape[3], to);
  }

  std::int64_t head_dim_;
  std::int64_t value_dim_;
  std::int64_t chunk_keys_;
  std::uint16_t* rows_ = nullptr;  // [32, dim]
  float* pair_rows_ = nullptr;     // [16, dim]
  float* halves_ = nullptr;        // [lanes, dim / 2]
};

#endif  // ANNULUS_AMX

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_BACKWARD_OPERANDS_INL
