#pragma once

#include <cstdint>

namespace annulus::kernels::cpu {

/// Threads that the kernels use; the functions below keep all of them busy.
int threads();

/// Floating-point operations done by `rounds` rounds of multiply-adds that never leave registers,
/// on the widest vectors of this processor: timed, it is the ceiling of any f32 kernel.
double multiply_add_rounds(std::int64_t rounds);

/// The same for the dot product of bf16 pairs into f32; 0 where the processor has none.
double bf16_dot_rounds(std::int64_t rounds);

/// The same for bf16 products of the tile unit (AMX); 0 where the kernels have none.
double tile_product_rounds(std::int64_t rounds);

/// Reads `floats` floats once (a multiple of 64) and returns a sum of them.
float read_floats(const float* data, std::int64_t floats);

/// The name of the vectors in use, as "AVX3".
const char* vector_target();

}  // namespace annulus::kernels::cpu
