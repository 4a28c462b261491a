#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus verify`: recomputes rows of an output in double from the input and the options kept in
/// it, and compares all of it with a reference stored beside the queries, when there is one.
/// Prints a table; throws bad_data when an error is above the tolerance.
void verify_output(Arguments arguments);

}  // namespace annulus::launch
