#pragma once

#include <cstdint>
#include <optional>

namespace annulus::kernels::cpu {

/// Whether products of bf16 use the dot product of vectors (AVX512_BF16) where there is no tile
/// unit: the processor has it at the rate of f32 multiply-adds, and it was not switched off.
bool has_bf16_dots();

/// Switches the dot product off or on again for all threads, so that the ways without it can be
/// tested and measured where it is.
void allow_bf16_dots(bool allowed);

/// How decode attention goes through a cache by dot products: two tokens of all heads at a time,
/// which keeps the sums of all heads in L1 beside both streams of memory, or, with weights in bf16,
/// the keys of a run of tokens before the values of another, and where O of all heads is too large
/// for that the values of a tile of tokens head by head.
enum class DotDecode : std::uint8_t { pairs, heads };

/// Pairs where L1 has 48 KB, unless it was chosen.
DotDecode dot_decode();

/// Chooses for all threads, or leaves it to the processor again, so that both ways can be tested
/// and measured anywhere.
void choose_dot_decode(std::optional<DotDecode> choice);

}  // namespace annulus::kernels::cpu
