#pragma once

#include <type_traits>

#include "kernels/sm90/forward_tile.cuh"

/// A warp's scores once more, by the products of single warps (PTX ISA, "mma.sync"), whose
/// accumulators lie as wgmma's do: for a warp that finds out that it needs them after all, while
/// the others of its warpgroup go on.
namespace annulus::kernels::sm90 {

/// Four 8×8 matrices: each lane names a row of 16 bytes, lanes 8i to 8i + 7 those of matrix i.
__device__ inline void load_matrices(std::uint32_t (&m)[4], std::uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

template <typename Element>
__device__ inline void multiply_16x8(float* c, const std::uint32_t (&a)[4], std::uint32_t b0,
                                     std::uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Address of 16 bytes of a row in boxes of `rows` rows each.
template <typename Layout>
__device__ inline std::uint32_t chunk_address(std::uint32_t tile, int rows, int row, int chunk) {
  constexpr int kRowBytes = Layout::kColumns * 2;
  constexpr int kChunks = kRowBytes / 16;
  const int permuted = chunk % kChunks ^ (row * kRowBytes / 128 & (kChunks - 1));
  return tile + (chunk / kChunks * rows + row) * kRowBytes + permuted * 16;
}

/// Scores of the warp's sixteen rows with all keys of a block.
template <typename Tile, int kCount>
__device__ inline void rescore(float (&s)[kCount], const void* q, const void* k, int first_key) {
  using Layout = typename Tile::QkTile;
  const std::uint32_t q_tile = shared_address(q);
  const std::uint32_t k_tile = shared_address(k);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int q_row = static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane % 16;
  const int k_row = first_key + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (float& x : s) x = 0.0F;
#pragma unroll 1
  for (int step = 0; step < Tile::kHeadDim / 16; ++step) {
    std::uint32_t a[4];
    load_matrices(a, chunk_address<Layout>(q_tile, 64, q_row, 2 * step + lane / 16));
    const std::uint32_t first =
        chunk_address<Layout>(k_tile, Tile::kBlock, k_row, 2 * step + lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i) {  // sixteen rows on, the permutation is the same
      std::uint32_t b[4];
      load_matrices(b, first + i * 16 * Layout::kColumns * 2);
      multiply_16x8<typename Tile::Element>(&s[8 * i], a, b[0], b[1]);
      multiply_16x8<typename Tile::Element>(&s[8 * i + 4], a, b[2], b[3]);
    }
  }
}

}  // namespace annulus::kernels::sm90
