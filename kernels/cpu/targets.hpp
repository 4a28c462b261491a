#pragma once

// Which Highway targets the kernels are compiled for: include before hwy/foreach_target.h.
// SSSE3 saves compile time (no processor since 2008 stops there); scalable vectors cannot be
// members of the register arrays in which the tiles accumulate.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
