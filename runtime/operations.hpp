#pragma once

#include <span>

#include "runtime/operation_registry.hpp"

namespace annulus {

/// THE table: every operation that annulus itself brings. To add one, write its file and a row.
std::span<const OperationEntry> operations();

}  // namespace annulus
