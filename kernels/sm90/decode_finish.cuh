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

/// __threadfence() without its sequential consistency.
__device__ inline void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

/// Whether this thread block is the last of the unit's to arrive, once `threads` of it, one of them
/// the leader, have written their parts. The counter is then back at 0 for the next launch.
__device__ inline bool arrive_last(const DecodeParams& p, const DecodeUnit& unit, int lane,
                                   std::int32_t* flag, int barrier, int threads, bool leader) {
  fence_device();
  named_barrier_sync(barrier, threads);
  if (leader) {
    unsigned* counter = p.arrivals + std::int64_t{unit.first_group} * p.lanes.value + lane;
    const bool last = atomicAdd(counter, 1U) + 1 == static_cast<unsigned>(unit.pieces);
    if (last) *counter = 0;
    *flag = last ? 1 : 0;
    fence_device();
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

  __device__ void add(const float2& statistics, const float4& values) {
    if (statistics.x == -INFINITY) return;
    const float both = fmaxf(max, statistics.x);
    const float kept = exp2_approx(max - both);
    const float weight = exp2_approx(statistics.x - both);
    max = both;
    sum = sum * kept + statistics.y * weight;
    o.x = o.x * kept + values.x * weight;
    o.y = o.y * kept + values.y * weight;
    o.z = o.z * kept + values.z * weight;
    o.w = o.w * kept + values.w * weight;
  }
};

template <int kValueDim>
__device__ inline MergedRow merge_row(const DecodeParams& p, const DecodeUnit& unit, int lane,
                                      int row, int column) {
  constexpr int kAtOnce = 8;  // loads under way: the whole launch waits for this
  MergedRow merged;
#pragma unroll 1
  for (int first = 0; first < unit.pieces; first += kAtOnce) {
    float2 statistics[kAtOnce];
    float4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int piece = min(first + i, unit.pieces - 1);
      const std::int64_t at = partial_slot(p, unit, lane, piece) * kTileRows + row;
      statistics[i] = __ldcg(p.partial_statistics + at);
      values[i] = __ldcg(reinterpret_cast<const float4*>(p.partial_o + at * kValueDim + column));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < unit.pieces) merged.add(statistics[i], values[i]);
    }
  }
  return merged;
}

/// Merges the pieces in their order, whoever does it: the same bits each time.
template <typename Element, int kValueDim>
__device__ inline void merge_pieces(const DecodeParams& p, const DecodeUnit& unit, int lane,
                                    int thread, int threads) {
  constexpr int kFours = kValueDim / 4;
  for (int i = thread; i < unit.rows * kFours; i += threads) {
    const int column = i % kFours * 4;
    const MergedRow merged = merge_row<kValueDim>(p, unit, lane, i / kFours, column);
    const DecodeRow at(p, unit, i / kFours);
    const ClosedRow closed(p, merged.max, merged.sum, at.head);
    write_four<Element>(p, at, column, merged.o, closed.factor);
    if (column == 0) closed.write_statistics(p, at);
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
