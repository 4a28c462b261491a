#pragma once

#include "launch/commands.hpp"

namespace annulus::launch {

/// `annulus diverged FOLDER`: names the first rank that left the common course, from the steps that
/// the ranks of a job dumped when it hung.
void name_diverged(Arguments arguments);

}  // namespace annulus::launch
