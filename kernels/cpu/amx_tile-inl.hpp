// The tile unit (AMX): eight registers of 16 rows of 64 bytes, and their product of bf16 pairs,
//   C[16, 16] += A[16, 32]·B[32, 16],
// where B has two rows of the matrix in each of its own, a pair of elements to a column.
#if defined(ANNULUS_CPU_AMX_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_AMX_TILE_INL
#undef ANNULUS_CPU_AMX_TILE_INL
#else
#define ANNULUS_CPU_AMX_TILE_INL
#endif

#include <cstdint>
#include <optional>

#include "hwy/highway.h"
#include "kernels/cpu/amx.hpp"
#include "kernels/types.hpp"

#undef ANNULUS_AMX
#if HWY_TARGET == HWY_AVX3 && defined(__x86_64__)
#define ANNULUS_AMX 1
#else
#define ANNULUS_AMX 0
#endif

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

inline constexpr std::int64_t kAmxRows = 16;
inline constexpr std::int64_t kAmxColumns = 16;  // of f32, and of pairs of bf16
inline constexpr std::int64_t kAmxDepth = 32;    // of a product
inline constexpr std::int64_t kAmxBytes = 1024;  // of a tile

#if ANNULUS_AMX

/// All eight registers configured as 16 rows of 64 bytes on this thread while it lives.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) Configuration {
      std::uint8_t palette = 1;
      std::uint8_t start_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    const Configuration configuration;
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~AmxTiles() { asm volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

template <int kTile>
HWY_INLINE void amx_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

/// `stride` bytes from row to row.
template <int kTile>
HWY_INLINE void amx_load(const void* rows, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

/// The same for rows that are used once and stream through L2: they need not stay in L1.
template <int kTile>
HWY_INLINE void amx_stream(const void* rows, std::int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
HWY_INLINE void amx_store(void* rows, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

/// C += A·B. Denormal elements count as 0.
template <int kC, int kA, int kB>
HWY_INLINE void amx_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

#endif  // ANNULUS_AMX

/// Whether products of this type go to the tile unit as they are.
inline bool uses_amx([[maybe_unused]] DType dtype) {
#if ANNULUS_AMX
  return dtype == DType::bf16 && cpu::has_amx();
#else
  return false;
#endif
}

/// Whether products of this type go to the tile unit as sums of products of bf16.
inline bool splits_on_amx([[maybe_unused]] DType dtype) {
#if ANNULUS_AMX
  return (dtype == DType::f32 || dtype == DType::f16) && cpu::has_amx();
#else
  return false;
#endif
}

/// The registers configured on this thread while it lives, where the tile unit is used.
class AmxScope {
 public:
  explicit AmxScope([[maybe_unused]] bool used) {
#if ANNULUS_AMX
    if (used) tiles_.emplace();
#endif
  }

 private:
#if ANNULUS_AMX
  std::optional<AmxTiles> tiles_;
#endif
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_AMX_TILE_INL
