// Small matrix products whose output lanes are one tile wide: C[rows, lanes] from A (one element
// broadcast at a time, so A may stay in its natural layout) and B (vectors along the lanes).
#if defined(ANNULUS_CPU_GEMM_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_GEMM_TILE_INL
#undef ANNULUS_CPU_GEMM_TILE_INL
#else
#define ANNULUS_CPU_GEMM_TILE_INL
#endif

#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using FloatVec = hn::Vec<Floats>;
inline constexpr std::int64_t kLanes = HWY_LANES(float);

// 8×3 accumulators, three vectors of B and a broadcast fit 32 registers and need 11 loads for 24
// multiply-adds; with 16 registers the panel halves.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON
inline constexpr int kPanelRows = 8;
#else
inline constexpr int kPanelRows = 4;
#endif
inline constexpr int kTileVectors = 3;
/// Queries of a tile: one to a lane.
inline constexpr std::int64_t kTileLanes = kTileVectors * kLanes;

enum class Update : std::uint8_t {
  overwrite,  // C = A·B
  add,        // C += A·B
  rescale,    // C = C·factor + A·B, a factor for each lane
};

/// How A(row, step) lies in memory: rows next to each other, or steps.
enum class Adjacent : std::uint8_t { rows, steps };

struct GemmShape {
  std::int64_t rows = 0;  // a multiple of 8
  std::int64_t vectors = 0;
  std::int64_t steps = 0;
};

template <Adjacent kAdjacent>
HWY_INLINE const float* a_element(const float* a, std::int64_t lda, std::int64_t row,
                                  std::int64_t step) {
  return kAdjacent == Adjacent::rows ? a + step * lda + row : a + row * lda + step;
}

template <int kVectors, Update kUpdate, Adjacent kAdjacent>
HWY_NOINLINE void gemm_panel(std::int64_t steps, const float* HWY_RESTRICT a, std::int64_t lda,
                             const float* HWY_RESTRICT b, std::int64_t ldb, float* HWY_RESTRICT c,
                             std::int64_t ldc, const float* HWY_RESTRICT factor) {
  const Floats d;
  FloatVec sum[kPanelRows][kVectors];
  HWY_UNROLL(8)
  for (int r = 0; r < kPanelRows; ++r) {
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kUpdate == Update::overwrite) {
        sum[r][v] = hn::Zero(d);
      } else {
        sum[r][v] = hn::Load(d, c + r * ldc + v * kLanes);
      }
      if constexpr (kUpdate == Update::rescale) {
        sum[r][v] = hn::Mul(sum[r][v], hn::Load(d, factor + v * kLanes));
      }
    }
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    FloatVec row_b[kVectors];
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) row_b[v] = hn::Load(d, b + step * ldb + v * kLanes);
    HWY_UNROLL(8)
    for (int r = 0; r < kPanelRows; ++r) {
      const FloatVec element = hn::Set(d, *a_element<kAdjacent>(a, lda, r, step));
      HWY_UNROLL(3)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(element, row_b[v], sum[r][v]);
    }
  }
  HWY_UNROLL(8)
  for (int r = 0; r < kPanelRows; ++r) {
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) hn::Store(sum[r][v], d, c + r * ldc + v * kLanes);
  }
}

template <int kVectors, Update kUpdate, Adjacent kAdjacent>
HWY_INLINE void gemm_panels(std::int64_t rows, std::int64_t steps, const float* a, std::int64_t lda,
                            const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                            const float* factor) {
  for (std::int64_t row = 0; row < rows; row += kPanelRows) {
    gemm_panel<kVectors, kUpdate, kAdjacent>(steps, a_element<kAdjacent>(a, lda, row, 0), lda, b,
                                             ldb, c + row * ldc, ldc, factor);
  }
}

/// B, C and `factor` are vector-aligned, and so are ldb and ldc.
template <Update kUpdate, Adjacent kAdjacent>
void gemm(const GemmShape& shape, const float* a, std::int64_t lda, const float* b,
          std::int64_t ldb, float* c, std::int64_t ldc, const float* factor = nullptr) {
  std::int64_t left = shape.vectors;
  while (left > 0) {
    // Four vectors go as 2 + 2: a panel of one vector is bound by its broadcasts.
    const std::int64_t vectors = left == 4 ? 2 : HWY_MIN(left, kTileVectors);
    if (vectors == 3) {
      gemm_panels<3, kUpdate, kAdjacent>(shape.rows, shape.steps, a, lda, b, ldb, c, ldc, factor);
    } else if (vectors == 2) {
      gemm_panels<2, kUpdate, kAdjacent>(shape.rows, shape.steps, a, lda, b, ldb, c, ldc, factor);
    } else {
      gemm_panels<1, kUpdate, kAdjacent>(shape.rows, shape.steps, a, lda, b, ldb, c, ldc, factor);
    }
    left -= vectors;
    b += vectors * kLanes;
    c += vectors * kLanes;
    if (factor != nullptr) factor += vectors * kLanes;
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_GEMM_TILE_INL
