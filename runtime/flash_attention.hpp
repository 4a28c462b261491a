#pragma once

#include "runtime/operation_registry.hpp"

namespace annulus {

/// `flash_attn2`, alias `flash`: blocked attention that never forms the weights (Dao, 2023), local
/// to a rank: query rows stay where they are, every rank gets the keys of the whole sequence.
OperationEntry flash_attention();

/// `sdpa`, aliases `cudnn`, `cuda_flash_attn2`: the same by the vendor library on a device; what it
/// does not offer (f32, dense masks, soft cap, dropout, documents) by the project's own kernels.
OperationEntry sdpa_attention();

}  // namespace annulus
