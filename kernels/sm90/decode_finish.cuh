#pragma once

#include "kernels/sm90/decode_tile.cuh"
#include "kernels/sm90/forward_epilogue.cuh"

/// End of a unit: writes O or the state of its rows, or a partial result, which the last thread
/// block to arrive merges with the others'.
namespace annulus::kernels::sm90 {

/// One query head of one token.
struct DecodeRow {
  std::int64_t token;
  std::int32_t head;

  __device__ DecodeRow(const DecodeParams& p, const DecodeUnit& unit, int row) {
    const int at = unit.first_row + row;
    const int query = divide(at, p.pack);
    token = unit.query_begin + query;
    head = unit.part * p.pack.value + at - query * p.pack.value;
  }
  __device__ std::int64_t offset(const TokenStrides& strides) const {
    return token * strides.token + head * strides.head;
  }
};

/// A row's statistics as they are written, and what its accumulator is still to be multiplied by.
struct ClosedRow {
  float factor, max, sum;  // max in powers of two
  bool no_values;          // the accumulator holds no number worth keeping

  __device__ ClosedRow(const DecodeParams& p, float max2, float row_sum, int head)
      : factor(1.0F), max(max2), sum(row_sum), no_values(max2 == -INFINITY) {
    if (p.sinks != nullptr) {
      const float sink = p.sinks[head] * kLog2E;
      const float both = fmaxf(max, sink);
      const float base = both == -INFINITY ? 0.0F : both;
      factor = exp2_approx(max - base);
      sum = sum * factor + exp2_approx(sink - base);
      max = both;
    }
    if (p.o != nullptr) {
      factor = sum > 0.0F ? __fdividef(factor, sum) : (max == -INFINITY ? 0.0F : factor / sum);
    }
  }

  __device__ void write_statistics(const DecodeParams& p, const DecodeRow& row) const {
    if (p.o == nullptr) {
      p.row_max[row.offset(p.max_strides)] = max * kLn2;
      p.row_sum[row.offset(p.sum_strides)] = sum;
    } else if (p.lse != nullptr) {
      p.lse[row.offset(p.lse_strides)] = max == -INFINITY ? -INFINITY : (max + __log2f(sum)) * kLn2;
    }
  }
};

/// The whole result lies in this warpgroup's registers; `column` is where its values begin.
template <typename Element, int kCount>
__device__ inline void write_row(const DecodeParams& p, const DecodeUnit& unit, float (&o)[kCount],
                                 int row, int local_row, float max2, float sum, int column) {
  const bool valid = local_row < unit.rows;
  const DecodeRow at(p, unit, valid ? local_row : 0);
  const ClosedRow closed(p, max2, sum, at.head);
  if (closed.no_values) {
#pragma unroll
    for (int i = 2 * row; i < kCount; i += 4) o[i] = o[i + 1] = 0.0F;
  }
  if (p.o != nullptr && !p.output_f32) {
    store_row(o, row, closed.factor, static_cast<Element*>(p.o) + at.offset(p.o_strides) + column,
              valid);
  } else if (valid) {
    float* out = p.o != nullptr ? static_cast<float*>(p.o) + at.offset(p.o_strides)
                                : p.accumulator + at.offset(p.accumulator_strides);
    store_row_f32(o, row, closed.factor, out + column);
  }
  if (valid && column == 0 && threadIdx.x % 4 == 0) closed.write_statistics(p, at);
}

/// A thread block has two slots: for a unit that began before its run, and for one that goes on
/// after it. Piece i of a unit is that of group first_group + i.
__device__ inline std::int64_t partial_slot(const DecodeParams& p, const DecodeUnit& unit, int lane,
                                            int piece) {
  const std::int64_t block = std::int64_t{unit.first_group + piece} * p.lanes.value + lane;
  return 2 * block + (piece == 0 ? 1 : 0);
}

/// atomicAdd() that releases what the thread block wrote before the barrier in front of it, and
/// acquires what is read behind the next one.
__device__ inline unsigned add_acq_rel(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

/// Whether this thread block is the last of `count` to arrive at a counter, once `threads` of it,
/// one of them the leader, have written their parts. The counter is then back at 0 for the next
/// launch.
__device__ inline bool arrive_last(unsigned* counter, int count, std::int32_t* flag, int barrier,
                                   int threads, bool leader) {
  named_barrier_sync(barrier, threads);
  if (leader) {
    const bool last = add_acq_rel(counter, 1U) + 1 == static_cast<unsigned>(count);
    if (last) *counter = 0;
    *flag = last ? 1 : 0;
  }
  named_barrier_sync(barrier, threads);
  return *flag != 0;
}

template <typename Element>
__device__ inline void write_four(const DecodeParams& p, const DecodeRow& row, int column,
                                  const float4& values, float factor) {
  const float4 v =
      make_float4(values.x * factor, values.y * factor, values.z * factor, values.w * factor);
  if (p.o == nullptr) {
    *reinterpret_cast<float4*>(p.accumulator + row.offset(p.accumulator_strides) + column) = v;
  } else if (p.output_f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(p.o) + row.offset(p.o_strides) + column) = v;
  } else {
    *reinterpret_cast<uint2*>(static_cast<Element*>(p.o) + row.offset(p.o_strides) + column) =
        make_uint2(pack_pair<Element>(v.x, v.y), pack_pair<Element>(v.z, v.w));
  }
}

/// Four columns of a row, merged so far.
struct MergedRow {
  float max = -INFINITY;
  float sum = 0.0F;
  float4 o = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

  /// Pieces without keys, whose maximum is -inf, hold no numbers worth adding.
  template <int kCount>
  __device__ void add(const float2 (&statistics)[kCount], const float4 (&values)[kCount]) {
    const float before = max;
#pragma unroll
    for (const float2& piece : statistics) max = fmaxf(max, piece.x);
    const float base = max == -INFINITY ? 0.0F : max;
    scale(exp2_approx(before - base));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (statistics[i].x == -INFINITY) continue;
      const float weight = exp2_approx(statistics[i].x - base);
      sum += statistics[i].y * weight;
      o.x += values[i].x * weight;
      o.y += values[i].y * weight;
      o.z += values[i].z * weight;
      o.w += values[i].w * weight;
    }
  }

 private:
  __device__ void scale(float factor) {
    sum *= factor;
    o = make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
  }
};

/// Partial results that are merged at a time, with as many loads under way: a launch waits for it.
inline constexpr int kMergedAtOnce = 8;
/// A unit of more than twice as many pieces is merged in sets of so many, each by the last thread
/// block of the set, and the last of these merges the sets: one alone would take longer than the
/// keys.
inline constexpr int kPieceSet = 8;

/// Partial results to be merged: pieces of a unit from `first` on, or its sets.
struct PieceRange {
  int first, count;
  bool sets;

  /// A set's result lies in the second slot of its first thread block, which goes on with this unit
  /// and so leaves no other there; of the first set it is the second block's. A set of one, at the
  /// end, is that piece.
  __device__ std::int64_t slot(const DecodeParams& p, const DecodeUnit& unit, int lane,
                               int i) const {
    const int piece = sets ? i * kPieceSet : first + i;
    if (!sets || piece == unit.pieces - 1) return partial_slot(p, unit, lane, piece);
    const int holder = unit.first_group + max(piece, 1);
    return 2 * (std::int64_t{holder} * p.lanes.value + lane) + 1;
  }
};

template <int kValueDim>
__device__ inline MergedRow merge_row(const DecodeParams& p, const DecodeUnit& unit, int lane,
                                      const PieceRange& range, int row, int column) {
  MergedRow merged;
#pragma unroll 1
  for (int first = 0; first < range.count; first += kMergedAtOnce) {
    float2 statistics[kMergedAtOnce];
    float4 values[kMergedAtOnce];
#pragma unroll
    for (int i = 0; i < kMergedAtOnce; ++i) {
      const int piece = min(first + i, range.count - 1);
      const std::int64_t at = range.slot(p, unit, lane, piece) * kTileRows + row;
      statistics[i] = __ldcg(p.partial_statistics + at);
      values[i] = __ldcg(reinterpret_cast<const float4*>(p.partial_o + at * kValueDim + column));
      if (first + i >= range.count) statistics[i].x = -INFINITY;
    }
    merged.add(statistics, values);
  }
  return merged;
}

/// Merges partial results in their order, whoever does it: the same bits each time. They become
/// O or the state, or the result of a set in slot `to`.
template <typename Element, int kValueDim>
__device__ inline void merge_range(const DecodeParams& p, const DecodeUnit& unit, int lane,
                                   const PieceRange& range, std::int64_t to, int thread,
                                   int threads) {
  constexpr int kFours = kValueDim / 4;
  for (int i = thread; i < unit.rows * kFours; i += threads) {
    const int row = i / kFours;
    const int column = i % kFours * 4;
    const MergedRow merged = merge_row<kValueDim>(p, unit, lane, range, row, column);
    if (to >= 0) {
      const std::int64_t at = to * kTileRows + row;
      *reinterpret_cast<float4*>(p.partial_o + at * kValueDim + column) = merged.o;
      if (column == 0) p.partial_statistics[at] = make_float2(merged.max, merged.sum);
      continue;
    }
    const DecodeRow at(p, unit, row);
    const ClosedRow closed(p, merged.max, merged.sum, at.head);
    write_four<Element>(p, at, column, merged.o, closed.factor);
    if (column == 0) closed.write_statistics(p, at);
  }
}

/// Once a piece is written: merges what this thread block is the last to have arrived for, which
/// `threads` of it take part in. kInSets: whether many pieces are merged in sets.
template <typename Element, int kValueDim, bool kInSets = true>
__device__ inline void merge_pieces(const DecodeParams& p, const DecodeUnit& unit, int lane,
                                    int piece, std::int32_t* flag, int barrier, int thread,
                                    int threads) {
  const bool in_sets = kInSets && unit.pieces > 2 * kMergedAtOnce;
  const int set = piece / kPieceSet;
  PieceRange range{0, unit.pieces, false};
  if (in_sets) range = {set * kPieceSet, min(kPieceSet, unit.pieces - set * kPieceSet), false};
  unsigned* const counters = p.arrivals + std::int64_t{unit.first_group} * p.lanes.value + lane;
#pragma unroll 1
  for (bool to_set = in_sets;; to_set = false) {
    // Counters of sets lie after those of units.
    unsigned* const counter = counters + (to_set ? range.first * p.lanes.value + gridDim.x : 0);
    if (range.count > 1 &&
        !arrive_last(counter, range.count, flag, barrier, threads, thread == 0)) {
      return;
    }
    const PieceRange all{0, (unit.pieces + kPieceSet - 1) / kPieceSet, true};
    if (range.count > 1) {
      merge_range<Element, kValueDim>(p, unit, lane, range,
                                      to_set ? all.slot(p, unit, lane, set) : -1, thread, threads);
    }
    if (!to_set) return;
    range = all;
  }
}

/// This piece's rows, for merge_pieces(); `column` is where the values in these registers begin.
template <int kValueDim, int kCount>
__device__ inline void write_partial(const DecodeParams& p, std::int64_t slot,
                                     const float (&o)[kCount], int row, int local_row, float max2,
                                     float sum, int column) {
  const std::int64_t at = slot * kTileRows + local_row;
  store_row_f32(o, row, 1.0F, p.partial_o + at * kValueDim + column);
  if (column == 0 && threadIdx.x % 4 == 0) p.partial_statistics[at] = make_float2(max2, sum);
}

}  // namespace annulus::kernels::sm90
