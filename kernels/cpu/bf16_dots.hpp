#pragma once

namespace annulus::kernels::cpu {

/// Whether products of bf16 use the dot product of vectors (AVX512_BF16) where there is no tile
/// unit: the processor has it at the rate of f32 multiply-adds, and it was not switched off.
bool has_bf16_dots();

/// Switches the dot product off or on again for all threads, so that the ways without it can be
/// tested and measured where it is.
void allow_bf16_dots(bool allowed);

}  // namespace annulus::kernels::cpu
