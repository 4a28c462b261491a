// Small matrix products C[rows, lanes] from A, one element broadcast at a time, and B, vectors
// along the lanes.
#if defined(ANNULUS_CPU_GEMM_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_GEMM_TILE_INL
#undef ANNULUS_CPU_GEMM_TILE_INL
#else
#define ANNULUS_CPU_GEMM_TILE_INL
#endif

#include <cstdint>
#include <span>

#include "hwy/highway.h"
#include "kernels/cpu/row_prefetch.hpp"

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

/// What a step of a product multiplies: numbers, or pairs of bf16 in the bits of a float, whose two
/// products are added.
enum class Elements : std::uint8_t { f32, bf16_pairs };

// sum + a·b.
template <Elements kElements>
HWY_INLINE FloatVec add_product(FloatVec a, FloatVec b, FloatVec sum) {
#if HWY_TARGET == HWY_AVX3
  // An instruction that Highway 1.0 has no target for. Denormals count as 0.
  if constexpr (kElements == Elements::bf16_pairs) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
    return sum;
  }
#endif
  return hn::MulAdd(a, b, sum);
}

/// How A(row, step) lies in memory. Both have constant strides, so that an unrolled loop addresses
/// eight rows from one register.
enum class Layout : std::uint8_t {
  panels,  // [rows / 8, steps, 8]: packed K and V
  tile,    // [rows, lanes of a tile]: probabilities
};

struct GemmShape {
  std::int64_t rows = 0;  // a multiple of 8
  std::int64_t vectors = 0;
  std::int64_t steps = 0;
};

/// Strides of A in elements: to the next step, and to the next row of a panel.
template <Layout kLayout>
inline constexpr std::int64_t kStepStride = kLayout == Layout::panels ? 8 : 1;
template <Layout kLayout>
inline constexpr std::int64_t kRowStride = kLayout == Layout::panels ? 1 : kTileLanes;

// sum += A(·, step)·B(step, ·) for one step.
template <int kVectors, Layout kLayout, Elements kElements>
HWY_INLINE void gemm_step(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b,
                          FloatVec (&sum)[kPanelRows][kVectors]) {
  const Floats d;
  FloatVec row_b[kVectors];
  HWY_UNROLL(3)
  for (int v = 0; v < kVectors; ++v) row_b[v] = hn::Load(d, b + v * kLanes);
  HWY_UNROLL(8)
  for (int r = 0; r < kPanelRows; ++r) {
    const FloatVec element = hn::Set(d, a[r * kRowStride<kLayout>]);
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = add_product<kElements>(element, row_b[v], sum[r][v]);
    }
  }
}

// The product is summed by itself before C joins it: thousands of small terms that were added to a
// large C one by one would all be rounded away.
template <int kVectors, Update kUpdate, Layout kLayout, Elements kElements>
HWY_NOINLINE void gemm_panel(std::int64_t steps, const float* HWY_RESTRICT a,
                             const float* HWY_RESTRICT b, std::int64_t ldb, float* HWY_RESTRICT c,
                             std::int64_t ldc, const float* HWY_RESTRICT factor) {
  const Floats d;
  FloatVec sum[kPanelRows][kVectors];
  HWY_UNROLL(8)
  for (int r = 0; r < kPanelRows; ++r) {
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::Zero(d);
  }
  // Four steps to a branch: a short loop's exit is mispredicted otherwise.
  for (; steps >= 4; steps -= 4) {
    HWY_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      gemm_step<kVectors, kLayout, kElements>(a + i * kStepStride<kLayout>, b + i * ldb, sum);
    }
    a += 4 * kStepStride<kLayout>;
    b += 4 * ldb;
  }
  for (; steps > 0; --steps) {
    gemm_step<kVectors, kLayout, kElements>(a, b, sum);
    a += kStepStride<kLayout>;
    b += ldb;
  }
  HWY_UNROLL(8)
  for (int r = 0; r < kPanelRows; ++r) {
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + r * ldc + v * kLanes;
      if constexpr (kUpdate == Update::add) {
        sum[r][v] = hn::Add(sum[r][v], hn::Load(d, at));
      } else if constexpr (kUpdate == Update::rescale) {
        sum[r][v] = hn::MulAdd(hn::Load(d, at), hn::Load(d, factor + v * kLanes), sum[r][v]);
      }
      hn::Store(sum[r][v], d, at);
    }
  }
}

/// Steps of a product in which only some consecutive vectors take part.
struct StepRun {
  std::int64_t steps = 0;
  std::int64_t first_vector = 0;
  std::int64_t vectors = 0;
};

// sum += A·B for some steps of vectors [kFirst, kFirst + kCount).
template <int kFirst, int kCount, Layout kLayout, Elements kElements, int kVectors>
HWY_INLINE void add_steps(std::int64_t steps, const float* HWY_RESTRICT a,
                          const float* HWY_RESTRICT b, std::int64_t ldb,
                          FloatVec (&sum)[kPanelRows][kVectors]) {
  const Floats d;
  if constexpr (kFirst + kCount <= kVectors) {
    for (std::int64_t step = 0; step < steps; ++step) {
      FloatVec row_b[kCount];
      HWY_UNROLL(3)
      for (int v = 0; v < kCount; ++v) row_b[v] = hn::Load(d, b + (kFirst + v) * kLanes);
      HWY_UNROLL(8)
      for (int r = 0; r < kPanelRows; ++r) {
        const FloatVec element = hn::Set(d, a[r * kRowStride<kLayout>]);
        HWY_UNROLL(3)
        for (int v = 0; v < kCount; ++v) {
          sum[r][kFirst + v] = add_product<kElements>(element, row_b[v], sum[r][kFirst + v]);
        }
      }
      a += kStepStride<kLayout>;
      b += ldb;
    }
  }
}

// As gemm_panel with Update::rescale.
template <int kVectors, Layout kLayout, Elements kElements>
HWY_NOINLINE void gemm_panel_runs(std::span<const StepRun> runs, const float* HWY_RESTRICT a,
                                  const float* HWY_RESTRICT b, std::int64_t ldb,
                                  float* HWY_RESTRICT c, std::int64_t ldc,
                                  const float* HWY_RESTRICT factor) {
  const Floats d;
  FloatVec sum[kPanelRows][kVectors];
  HWY_UNROLL(8)
  for (int r = 0; r < kPanelRows; ++r) {
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::Zero(d);
  }
  for (const StepRun& run : runs) {
    switch (4 * run.first_vector + run.vectors) {
      case 3:
        add_steps<0, 3, kLayout, kElements>(run.steps, a, b, ldb, sum);
        break;
      case 2:
        add_steps<0, 2, kLayout, kElements>(run.steps, a, b, ldb, sum);
        break;
      case 1:
        add_steps<0, 1, kLayout, kElements>(run.steps, a, b, ldb, sum);
        break;
      case 6:
        add_steps<1, 2, kLayout, kElements>(run.steps, a, b, ldb, sum);
        break;
      case 5:
        add_steps<1, 1, kLayout, kElements>(run.steps, a, b, ldb, sum);
        break;
      case 9:
        add_steps<2, 1, kLayout, kElements>(run.steps, a, b, ldb, sum);
        break;
      default:
        break;
    }
    a += run.steps * kStepStride<kLayout>;
    b += run.steps * ldb;
  }
  HWY_UNROLL(8)
  for (int r = 0; r < kPanelRows; ++r) {
    HWY_UNROLL(3)
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + r * ldc + v * kLanes;
      hn::Store(hn::MulAdd(hn::Load(d, at), hn::Load(d, factor + v * kLanes), sum[r][v]), d, at);
    }
  }
}

/// The left operand: eight rows lie at `data + (row / 8)·panel_stride`.
struct GemmA {
  const float* data = nullptr;
  std::int64_t panel_stride = 0;
};

inline GemmA tile_rows(const float* tile) { return {tile, 8 * kTileLanes}; }

template <int kVectors, Update kUpdate, Layout kLayout, Elements kElements>
void gemm_panels(std::int64_t rows, std::int64_t steps, const GemmA& a, const float* b,
                 std::int64_t ldb, float* c, std::int64_t ldc, const float* factor,
                 RowPrefetch* prefetch) {
  for (std::int64_t row = 0; row < rows; row += kPanelRows) {
    const float* panel = a.data + row / 8 * a.panel_stride + row % 8 * kRowStride<kLayout>;
    gemm_panel<kVectors, kUpdate, kLayout, kElements>(steps, panel, b, ldb, c + row * ldc, ldc,
                                                      factor);
    if (prefetch != nullptr) prefetch->step();
  }
}

/// B, C and `factor` are vector-aligned, and so are ldb and ldc. `prefetch` takes a step for each
/// panel.
template <Update kUpdate, Layout kLayout, Elements kElements = Elements::f32>
void gemm(const GemmShape& shape, const GemmA& a, const float* b, std::int64_t ldb, float* c,
          std::int64_t ldc, const float* factor = nullptr, RowPrefetch* prefetch = nullptr) {
  std::int64_t left = shape.vectors;
  while (left > 0) {
    // Four vectors go as 2 + 2: a panel of one vector is bound by its broadcasts.
    const std::int64_t vectors = left == 4 ? 2 : HWY_MIN(left, kTileVectors);
    const auto panels = vectors == 3   ? gemm_panels<3, kUpdate, kLayout, kElements>
                        : vectors == 2 ? gemm_panels<2, kUpdate, kLayout, kElements>
                                       : gemm_panels<1, kUpdate, kLayout, kElements>;
    panels(shape.rows, shape.steps, a, b, ldb, c, ldc, factor, prefetch);
    left -= vectors;
    b += vectors * kLanes;
    c += vectors * kLanes;
    if (factor != nullptr) factor += vectors * kLanes;
  }
}

/// As gemm with Update::rescale for at most kTileVectors vectors, where step runs leave out vectors
/// for which A·B is 0.
template <Layout kLayout, Elements kElements = Elements::f32>
void gemm_runs(std::int64_t rows, std::int64_t vectors, std::span<const StepRun> runs,
               const GemmA& a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
               const float* factor, RowPrefetch* prefetch) {
  const auto panel = vectors == 3   ? gemm_panel_runs<3, kLayout, kElements>
                     : vectors == 2 ? gemm_panel_runs<2, kLayout, kElements>
                                    : gemm_panel_runs<1, kLayout, kElements>;
  for (std::int64_t row = 0; row < rows; row += kPanelRows) {
    panel(runs, a.data + row / 8 * a.panel_stride + row % 8 * kRowStride<kLayout>, b, ldb,
          c + row * ldc, ldc, factor);
    prefetch->step();
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_GEMM_TILE_INL
