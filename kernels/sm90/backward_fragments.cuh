#pragma once

#include <cmath>

#include "kernels/sm90/backward_tile.cuh"
#include "kernels/sm90/forward_softmax.cuh"

/// Arithmetic on a warpgroup's fragments. Scores are transposed: a thread holds the keys lane/4 and
/// lane/4 + 8 of its warp's sixteen, and of the queries i / 4 * 8 + lane % 4 * 2 + i % 2.
namespace annulus::kernels::sm90 {

template <typename Element>
__device__ inline float2 unpack_pair(std::uint32_t pair);

template <>
__device__ inline float2 unpack_pair<__nv_bfloat16>(std::uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000U)};
}

template <>
__device__ inline float2 unpack_pair<__half>(std::uint32_t pair) {
  __half2 halves;
  memcpy(&halves, &pair, sizeof(pair));
  return __half22float2(halves);
}

/// Queries [begin, begin + count) of the block that see a key.
using QueryWindow = RowWindow;

__device__ inline QueryWindow query_window(const QueryNote& note, int k, int k_end) {
  if (k >= k_end) return {};
  const int begin = max(note.slice_q_begin, k - note.hi) - note.q_begin;
  const int end = min(note.slice_q_end, k - note.lo + 1) - note.q_begin;
  return {begin, static_cast<unsigned>(max(end - begin, 0))};
}

/// Scores to P, as dV's product takes it, and to the weights of dP: P times the slope of the soft
/// cap where there is one (else `weights` is not touched). P in fp32 would not fit the registers.
template <typename Element, bool kSoftCap, int kCount>
__device__ inline void probabilities(const float (&s)[kCount], std::uint32_t (&p)[kCount / 2],
                                     std::uint32_t (&weights)[kCount / 2], const float* lse,
                                     float exp_scale) {
  const int column = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float2 offset = *reinterpret_cast<const float2*>(lse + i * 2 + column);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float low_score = s[i + 2 * row];
      const float high_score = s[i + 2 * row + 1];
      const float low = exp2_approx(fmaf(low_score, exp_scale, -offset.x));
      const float high = exp2_approx(fmaf(high_score, exp_scale, -offset.y));
      p[i / 2 + row] = pack_pair<Element>(low, high);
      if constexpr (kSoftCap) {
        weights[i / 2 + row] =
            pack_pair<Element>(low == 0.0F ? 0.0F : low * (1.0F - low_score * low_score),
                               high == 0.0F ? 0.0F : high * (1.0F - high_score * high_score));
      }
    }
  }
}

/// dP of a masked pair may be NaN, which a weight of 0 would let through.
template <int kCount>
__device__ inline void clear_unweighted(const std::uint32_t (&weights)[kCount / 2],
                                        float (&dp)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    if ((weights[i] & 0xffffU) == 0) dp[2 * i] = 0.0F;
    if ((weights[i] >> 16) == 0) dp[2 * i + 1] = 0.0F;
  }
}

/// dS = weight·(dP − δ), in the element type.
template <typename Element, int kCount>
__device__ inline void scores_gradient(const std::uint32_t (&weights)[kCount / 2],
                                       const float (&dp)[kCount], const float* delta,
                                       std::uint32_t (&ds)[kCount / 2]) {
  const int column = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float2 offset = *reinterpret_cast<const float2*>(delta + i * 2 + column);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = i + 2 * row;
      const float2 weight = unpack_pair<Element>(weights[i / 2 + row]);
      ds[i / 2 + row] =
          pack_pair<Element>(weight.x * (dp[at] - offset.x), weight.y * (dp[at + 1] - offset.y));
    }
  }
}

/// Four 8×8 matrices, one row of which each lane addresses.
__device__ inline void store_matrices(void* row, const std::uint32_t* matrices) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
      "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
      : "memory");
}

/// The same four matrices, each transposed; `row` is an address in shared memory.
__device__ inline void store_matrices_transposed(std::uint32_t row, const std::uint32_t* matrices) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

__device__ inline void load_matrices(std::uint32_t row, std::uint32_t (&matrices)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

/// Where store_gradient_rows() of this lane begins, in bytes from a box [query][64 keys].
__device__ inline std::uint32_t gradient_row_bytes() {
  const std::uint32_t lane = threadIdx.x % 32;
  const std::uint32_t query = lane / 16 * 8 + lane % 8;
  const std::uint32_t chunk = (threadIdx.x % 128 / 32 * 2 + lane / 8 % 2) ^ (lane % 8);
  return query * 128 + chunk * 16;
}

/// Fragments of dSᵀ for 64 keys to [query][64 keys], which dQ's product contracts over.
template <int kCount>
__device__ inline void store_gradient_rows(const std::uint32_t (&ds)[kCount], std::uint32_t row) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) store_matrices_transposed(row + i / 4 * 16 * 128, &ds[i]);
}

/// Fragments of dSᵀ to [query box][key][64 queries], where dQ's product reads them transposed.
template <typename Tile>
__device__ inline void store_gradient(const std::uint32_t (&ds)[Tile::kQueries / 4],
                                      typename Tile::Element* tile, int first_key) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int key = first_key + static_cast<int>(threadIdx.x % 128 / 32 * 16) + lane % 16;
#pragma unroll
  for (int step = 0; step < Tile::kQueries / 16; ++step) {
    const int chunk = (step % 4 * 2 + lane / 16) ^ (key % 8);
    store_matrices(tile + (step / 4 * Tile::kKeys + key) * 64 + chunk * 8, &ds[4 * step]);
  }
}

/// Rows outside [begin, end) of a tile belong to others and may be NaN, which 0·NaN would let in.
template <typename Layout, int kRows, int kBoxes, typename Element>
__device__ inline void clear_foreign_rows(Element* tile, int begin, int end) {
  constexpr int kChunks = Layout::kColumns * 2 / 16;
  for (int i = static_cast<int>(threadIdx.x % 128); i < kBoxes * kRows * kChunks; i += 128) {
    const int row = i / kChunks % kRows;
    if (row < begin || row >= end) reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
  }
}

__device__ inline float2 load_shared_pair(std::uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
}

__device__ inline int load_shared_word(std::uint32_t address) {
  int word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

__device__ inline void store_shared(std::uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ inline void add_global(float* to, const float (&values)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

__device__ inline void store_global(float* to, const float (&values)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
}

/// This thread's row among the 64 of an accumulator once neighbours have traded: an even lane
/// takes four columns of row lane/4, an odd one of row lane/4 + 8.
__device__ inline int traded_row() {
  return static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + threadIdx.x % 2 * 8);
}

/// Adds scale times the accumulator to rows in global memory, or sets them to it; `row` is
/// traded_row's, column 0.
template <int kCount>
__device__ inline void add_rows(const float (&acc)[kCount], float scale, float* row, bool valid,
                                bool overwrite) {
  const bool odd = (threadIdx.x & 1U) != 0;
  float* to = row + threadIdx.x % 4 / 2 * 4;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float send0 = odd ? acc[i] : acc[i + 2];
    const float send1 = odd ? acc[i + 1] : acc[i + 3];
    const float keep0 = odd ? acc[i + 2] : acc[i];
    const float keep1 = odd ? acc[i + 3] : acc[i + 1];
    const float got0 = __shfl_xor_sync(0xffffffffU, send0, 1);
    const float got1 = __shfl_xor_sync(0xffffffffU, send1, 1);
    const float values[4] = {scale * (odd ? got0 : keep0), scale * (odd ? got1 : keep1),
                             scale * (odd ? keep0 : got0), scale * (odd ? keep1 : got1)};
    if (!valid) continue;
    overwrite ? store_global(to + i * 2, values) : add_global(to + i * 2, values);
  }
}

__device__ inline float* gradient_row(const GradientRows& rows, int batch, int row, int head) {
  return rows.data + batch * rows.strides.batch + row * rows.strides.row + head * rows.strides.head;
}

/// One arrival a warp, after all that its lanes did before.
template <typename Barrier>
__device__ inline void arrive_warp(Barrier barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

}  // namespace annulus::kernels::sm90
