#pragma once

#include "kernels/sm90/forward_rescore.cuh"
#include "kernels/sm90/forward_softmax.cuh"
#include "kernels/sm90/launch_early.cuh"
#include "kernels/sm90/tma.cuh"

/// End of a tile: merges the carried state, writes state or O and LSE, whole rows of 16 bits by the
/// copy engine and all else straight from registers.
namespace annulus::kernels::sm90 {

/// Where one of a thread's two rows goes.
struct OutputRow {
  int batch, q, head;
  bool valid;
};

__device__ inline OutputRow output_row(const ForwardParams& params, const TileNote& tile,
                                       int warpgroup, int local_row) {
  const int query = params.pack == 1 ? local_row : local_row / params.pack;
  const int q = tile.q_begin + warpgroup * params.warpgroup_queries + query;
  return {tile.batch, q, tile.unit_head + local_row - query * params.pack,
          query < params.warpgroup_queries && q < tile.q_end};
}

__device__ inline std::int64_t offset_of(const RowStrides& strides, const OutputRow& row) {
  return row.batch * strides.batch + row.q * strides.row + row.head * strides.head;
}

/// Transposes a 4×4 of words among the four lanes of a quad: lane i ends with column i.
__device__ inline void transpose_quad(std::uint32_t (&w)[4]) {
  const bool odd = (threadIdx.x & 1U) != 0;
  const bool upper = (threadIdx.x & 2U) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffU, odd ? w[i] : w[i + 1], 1);
    if (odd) {
      w[i] = other;
    } else {
      w[i + 1] = other;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffU, upper ? w[i] : w[i + 2], 2);
    if (upper) {
      w[i] = other;
    } else {
      w[i + 2] = other;
    }
  }
}

/// Writes a row in 16-byte pieces; every lane of a quad takes part.
template <typename Element, int kCount>
__device__ inline void store_row(const float (&o)[kCount], int row, float factor, Element* out,
                                 bool valid) {
  const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; i += 16) {
    std::uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = i + 4 * j + 2 * row;
      words[j] = pack_pair<Element>(o[at] * factor, o[at + 1] * factor);
    }
    transpose_quad(words);
    if (valid) {
      *reinterpret_cast<uint4*>(out + i * 2 + lane * 8) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

/// fp32 rows need no exchange: a quad's 32 bytes are a sector.
template <int kCount>
__device__ inline void store_row_f32(const float (&o)[kCount], int row, float factor, float* out) {
  const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    *reinterpret_cast<float2*>(out + i * 2 + lane * 2) =
        make_float2(o[i + 2 * row] * factor, o[i + 2 * row + 1] * factor);
  }
}

/// Has L2 fetch what the warp will merge at the tile's end. It need not be there yet: L2 is where
/// all writes end.
template <int kColumns>
__device__ inline void prefetch_state(const ForwardParams& params, const TileNote& tile,
                                      int warpgroup) {
  constexpr int kLines = kColumns * static_cast<int>(sizeof(float)) / 128;
  for (int i = static_cast<int>(threadIdx.x % 32); i < 16 * kLines; i += 32) {
    const int local_row = static_cast<int>(threadIdx.x % 128 / 32 * 16) + i / kLines;
    const OutputRow at = output_row(params, tile, warpgroup, local_row);
    if (!at.valid) continue;
    const float* row = params.accumulator + offset_of(params.accumulator_strides, at);
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i % kLines * 32));
    if (i % kLines != 0) continue;
    asm volatile(
        "prefetch.global.L2 [%0];" ::"l"(params.row_max + offset_of(params.max_strides, at)));
    asm volatile(
        "prefetch.global.L2 [%0];" ::"l"(params.row_sum + offset_of(params.sum_strides, at)));
  }
}

/// o ← o·own + carried·before. A row without keys holds no number worth keeping.
template <int kCount>
__device__ inline void add_carried(float (&o)[kCount], int row, float own, float before,
                                   const float* carried) {
  const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float2 c = __ldcg(reinterpret_cast<const float2*>(carried + i * 2 + lane * 2));
    float& x = o[i + 2 * row];
    float& y = o[i + 2 * row + 1];
    x = (own > 0.0F ? x * own : 0.0F) + (before > 0.0F ? c.x * before : 0.0F);
    y = (own > 0.0F ? y * own : 0.0F) + (before > 0.0F ? c.y * before : 0.0F);
  }
}

/// A row's maximum, in powers of two, and its sum.
struct CarriedRow {
  float max = -INFINITY, sum = 0.0F;
};

__device__ inline CarriedRow carried_row(const ForwardParams& params, const OutputRow& at) {
  if (!params.resume || !at.valid) return {};
  return {__ldcg(params.row_max + offset_of(params.max_strides, at)) * kLog2E,
          __ldcg(params.row_sum + offset_of(params.sum_strides, at))};
}

template <typename Element, int kCount>
__device__ inline void finish_row(const ForwardParams& params, float (&o)[kCount], int row,
                                  float raw_max, float sum, const OutputRow& at,
                                  const CarriedRow& carried) {
  float max = raw_max * params.exp_scale;  // in powers of two
  sum = quad_sum(sum);
  float factor = 1.0F;  // still to be applied to o
  if (params.resume && at.valid) {
    const float both = fmaxf(max, carried.max);
    const float base = both == -INFINITY ? 0.0F : both;
    const float own = exp2_approx(max - base);
    const float before = exp2_approx(carried.max - base);
    add_carried(o, row, own, before,
                params.accumulator + offset_of(params.accumulator_strides, at));
    sum = sum * own + carried.sum * before;
    max = both;
  }
  // A zero sum comes with an accumulator that may hold 0·NaN.
  bool empty = sum == 0.0F && max == -INFINITY;  // a sum that is no number stays one
  bool no_values = empty;
  if (params.sinks != nullptr && at.valid) {
    const float sink = params.sinks[at.head] * kLog2E;
    const float both = fmaxf(max, sink);
    const float base = both == -INFINITY ? 0.0F : both;
    factor = exp2_approx(max - base);
    sum = sum * factor + exp2_approx(sink - base);
    max = both;
    empty = max == -INFINITY;
  }
  if (no_values) {
#pragma unroll
    for (int i = 2 * row; i < kCount; i += 4) o[i] = o[i + 1] = 0.0F;
  }
  const bool first_lane = threadIdx.x % 4 == 0;
  if (params.o != nullptr) {
    const float norm = sum > 0.0F ? __fdividef(factor, sum) : (empty ? 0.0F : factor / sum);
    if (params.output_f32) {
      if (at.valid) {
        store_row_f32(o, row, norm,
                      static_cast<float*>(params.o) + offset_of(params.o_strides, at));
      }
    } else {
      store_row(o, row, norm, static_cast<Element*>(params.o) + offset_of(params.o_strides, at),
                at.valid);
    }
  } else if (at.valid) {
    store_row_f32(o, row, factor, params.accumulator + offset_of(params.accumulator_strides, at));
    if (first_lane) {
      params.row_max[offset_of(params.max_strides, at)] = max * kLn2;
      params.row_sum[offset_of(params.sum_strides, at)] = sum;
    }
  }
  if (params.lse != nullptr && at.valid && first_lane) {
    params.lse[offset_of(params.lse_strides, at)] = empty ? -INFINITY : (max + __log2f(sum)) * kLn2;
  }
}

/// Lanes 2i and 2i + 1 swap halves: of two words of eight columns each, the even lane ends with
/// both lanes' first word and the odd lane with both second ones. A quad then holds a sector of a
/// row.
__device__ inline uint2 swap_halves(std::uint32_t first, std::uint32_t second) {
  const bool odd = (threadIdx.x & 1U) != 0;
  const std::uint32_t other = __shfl_xor_sync(0xffffffffU, odd ? first : second, 1);
  return odd ? make_uint2(other, second) : make_uint2(first, other);
}

/// Four 8×8 matrices of 16-bit numbers as accumulators hold them: each lane names a row of 16
/// bytes, lanes 8i to 8i + 7 those of matrix i.
__device__ inline void store_matrices(std::uint32_t row, const std::uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

/// The warp's sixteen rows by the copy engine, in whole lines.
template <typename Tile, int kCount>
__device__ inline void store_staged(const ForwardParams& params, const TileNote& tile,
                                    int warpgroup, const float (&o)[kCount], const float (&norm)[2],
                                    typename Tile::Element* staging) {
  using Layout = typename Tile::VTile;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int first_row = static_cast<int>(threadIdx.x % 128 / 32) * 16;
  if (lane == 0) bulk_wait_read<0>();
  __syncwarp();
  const std::uint32_t memory = shared_address(staging);
#pragma unroll
  for (int i = 0; i < kCount; i += 8) {
    std::uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = pack_pair<typename Tile::Element>(o[i + 2 * j] * norm[j % 2],
                                                   o[i + 2 * j + 1] * norm[j % 2]);
    }
    store_matrices(chunk_address<Layout>(memory, 64, first_row + lane % 16, i / 4 + lane / 16),
                   words);
  }
  fence_async_shared();
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int box = 0; box < Tile::kVBoxes; ++box) {
      tma_store(&params.out, staging + (box * 64 + first_row) * Layout::kColumns,
                box * Layout::kColumns, tile.q_begin + warpgroup * 64 + first_row, tile.unit_head,
                tile.batch);
    }
    bulk_commit();
  }
}

/// The warp's sixteen rows of O and their LSE. Returns false, and does nothing, where not all of
/// them are the tile's or some have no keys.
template <typename Tile, int kCount>
__device__ inline bool finish_rows(const ForwardParams& params, const TileNote& tile, int warpgroup,
                                   const float (&o)[kCount], const RowStatistics& rows,
                                   typename Tile::Element* staging) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int q = tile.q_begin + warpgroup * 64 + static_cast<int>(threadIdx.x % 128 / 32) * 16;
  const float sum[2] = {quad_sum(rows.sum[0]), quad_sum(rows.sum[1])};
  const bool empty =
      (rows.max[0] == -INFINITY && sum[0] == 0.0F) || (rows.max[1] == -INFINITY && sum[1] == 0.0F);
  if (q + 16 > tile.q_end || __any_sync(0xffffffffU, empty)) return false;
  const float norm[2] = {__fdividef(1.0F, sum[0]), __fdividef(1.0F, sum[1])};
  store_staged<Tile>(params, tile, warpgroup, o, norm, staging);
  if (params.lse != nullptr && lane % 4 == 0) {
    float* const lse = params.lse + tile.batch * params.lse_strides.batch +
                       tile.unit_head * params.lse_strides.head +
                       (q + lane / 4) * params.lse_strides.row;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      lse[row * 8 * params.lse_strides.row] =
          (rows.max[row] * params.exp_scale + __log2f(sum[row])) * kLn2;
    }
  }
  return true;
}

/// From registers, both rows side by side: half the instructions.
template <typename Element, int kCount>
__device__ inline void store_direct(const ForwardParams& params, const OutputRow (&at)[2],
                                    const float (&o)[kCount], const float (&norm)[2],
                                    const bool (&empty)[2]) {
  const unsigned lane = threadIdx.x % 4;
  Element* out[2];
  bool stored[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    out[row] = static_cast<Element*>(params.o) + offset_of(params.o_strides, at[row]) +
               lane % 2 * 8 + lane / 2 * 4;
    stored[row] = at[row].valid && !empty[row];
    if (at[row].valid && empty[row]) [[unlikely]] {
#pragma unroll 1
      for (int i = 0; i < kCount; i += 8) *reinterpret_cast<uint2*>(out[row] + i * 2) = {};
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; i += 8) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float* x = &o[i + 2 * row];
      const float f = norm[row];
      const uint2 words = swap_halves(pack_pair<Element>(x[0] * f, x[1] * f),
                                      pack_pair<Element>(x[4] * f, x[5] * f));
      if (stored[row]) *reinterpret_cast<uint2*>(out[row] + i * 2) = words;
    }
  }
}

/// O and LSE alone, which most calls want.
template <typename Tile, int kCount>
__device__ inline void finish_plain(const ForwardParams& params, const TileNote& tile,
                                    int warpgroup, const OutputRow (&at)[2],
                                    const float (&o)[kCount], const RowStatistics& rows,
                                    typename Tile::Element* staging) {
  using Element = typename Tile::Element;
  const unsigned lane = threadIdx.x % 4;
  float sum[2], norm[2];
  bool empty[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    sum[row] = quad_sum(rows.sum[row]);
    empty[row] = rows.max[row] == -INFINITY && sum[row] == 0.0F;
    norm[row] = __fdividef(1.0F, sum[row]);
  }
  bool direct = true;
  if constexpr (Tile::kStaging != Tile::Staging::none) {
    const bool whole = at[0].valid && at[1].valid && !empty[0] && !empty[1];
    direct = !params.staged || !__all_sync(0xffffffffU, whole);
    if (!direct) store_staged<Tile>(params, tile, warpgroup, o, norm, staging);
  }
  if (direct) store_direct<Element>(params, at, o, norm, empty);
  if (params.lse == nullptr || lane != 0) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (!at[row].valid) continue;
    params.lse[offset_of(params.lse_strides, at[row])] =
        empty[row] ? -INFINITY : (rows.max[row] * params.exp_scale + __log2f(sum[row])) * kLn2;
  }
}

/// Leaves a warp's part of a piece of a tile behind. The last of the tile's pieces gets them all,
/// in their own order, so that the sum does not depend on which is last; for the others it is over.
template <int kCount>
__device__ inline bool merge_pieces(const ForwardParams& params, int piece, int warpgroup,
                                    float (&o)[kCount], RowStatistics& rows) {
  constexpr int kVectors = 1 + kCount / 4;
  const int warp = warpgroup * 4 + static_cast<int>(threadIdx.x % 128 / 32);
  const int warps = static_cast<int>(blockDim.x / 32) - 4;
  const int tile = piece / params.pieces;
  const int stride = warps * kVectors * 32;
  float4* const first = params.partials + std::int64_t{tile} * params.pieces * stride +
                        warp * kVectors * 32 + static_cast<int>(threadIdx.x % 32);
  float4* const own = first + piece % params.pieces * stride;
  own[0] = make_float4(rows.max[0], rows.max[1], rows.sum[0], rows.sum[1]);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    own[32 + i * 8] = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
  }
  __threadfence();
  __syncwarp();
  int arrived = 0;
  if (threadIdx.x % 32 == 0) {
    unsigned* const arrivals = params.arrivals + tile * warps + warp;
    arrived = static_cast<int>(atomicAdd(arrivals, 1U)) + 1;
    if (arrived == params.pieces) *arrivals = 0;
  }
  if (__shfl_sync(0xffffffffU, arrived, 0) != params.pieces) return false;
  __threadfence();

  rows = {};
  for (int i = 0; i < params.pieces; ++i) {
    const float4 part = __ldcg(first + i * stride);
    rows.max[0] = fmaxf(rows.max[0], part.x);
    rows.max[1] = fmaxf(rows.max[1], part.y);
  }
#pragma unroll
  for (float& x : o) x = 0.0F;
  for (int i = 0; i < params.pieces; ++i) {
    const float4 part = __ldcg(first + i * stride);
    const float max[2] = {part.x, part.y};
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      factor[row] =
          max[row] == -INFINITY ? 0.0F : exp2_approx((max[row] - rows.max[row]) * params.exp_scale);
    }
    rows.sum[0] += part.z * factor[0];
    rows.sum[1] += part.w * factor[1];
#pragma unroll
    for (int at = 0; at < kCount; at += 4) {
      const float4 x = __ldcg(first + i * stride + 32 + at * 8);
      if (factor[0] > 0.0F) {  // without keys a piece may hold 0·NaN
        o[at] += x.x * factor[0];
        o[at + 1] += x.y * factor[0];
      }
      if (factor[1] > 0.0F) {
        o[at + 2] += x.z * factor[1];
        o[at + 3] += x.w * factor[1];
      }
    }
  }
  return true;
}

template <typename Tile, int kCount>
__device__ inline void finish_tile(const ForwardParams& params, const TileNote& tile, int warpgroup,
                                   float (&o)[kCount], RowStatistics rows,
                                   typename Tile::Element* staging) {
  using Element = typename Tile::Element;
  const int local_row = static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
  if (!params.plain) await_earlier_launch();  // what merges nothing never begins early
  if (params.o == nullptr) admit_next_launch();
  if (tile.piece != 0 && !merge_pieces(params, tile.piece - 1, warpgroup, o, rows)) return;
  if constexpr (Tile::kStaging == Tile::Staging::own) {
    if (params.staged && finish_rows<Tile>(params, tile, warpgroup, o, rows, staging)) return;
  }
  const OutputRow at[2] = {output_row(params, tile, warpgroup, local_row),
                           output_row(params, tile, warpgroup, local_row + 8)};
  if (params.plain) return finish_plain<Tile>(params, tile, warpgroup, at, o, rows, staging);
  const CarriedRow carried[2] = {carried_row(params, at[0]), carried_row(params, at[1])};
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    finish_row<Element>(params, o, row, rows.max[row], rows.sum[row], at[row], carried[row]);
  }
}

}  // namespace annulus::kernels::sm90
