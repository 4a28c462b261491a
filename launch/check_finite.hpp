#pragma once

#include <string_view>

#include "runtime/context.hpp"
#include "runtime/distributed_tensor.hpp"

namespace annulus::launch {

/// Throws bad_data naming tensor, global index, value and rank when an element is NaN or infinite;
/// −inf is allowed where `minus_infinity` says so (rows without keys). Collective.
void check_finite(Context& context, std::string_view tensor_name, const DistributedTensor& tensor,
                  bool minus_infinity = false);

}  // namespace annulus::launch
