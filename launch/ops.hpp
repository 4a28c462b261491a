#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus ops`: the operations, their aliases, backends and what each accepts.
void list_operations(Arguments arguments);

}  // namespace annulus::launch
