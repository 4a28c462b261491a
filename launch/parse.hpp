#pragma once

#include <string>

#include "launch/commands.hpp"

namespace CLI {
class App;
}

namespace annulus::launch {

/// Fills what `app` is bound to. False when help was asked for and printed. Throws usage in one
/// line, missing_input for a configuration file that is not there.
bool parse(CLI::App& app, Arguments arguments);

/// Only rank 0 of a job speaks on standard output; also before MPI runs.
bool is_speaking_rank();

}  // namespace annulus::launch
