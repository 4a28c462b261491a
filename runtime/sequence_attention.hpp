#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "runtime/operation_registry.hpp"
#include "sharding/attention_plan.hpp"

namespace annulus {

/// What the operations over the sequence axis have in common: rows dealt, causal by default, and
/// keys that travel by `scheme`.
OperationEntry sequence_attention(std::vector<std::string> names, std::string computes,
                                  Scheme scheme, std::string_view accepts_besides = "");

}  // namespace annulus
