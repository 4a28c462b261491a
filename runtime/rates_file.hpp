#pragma once

#include <string>

#include "sharding/cost_model.hpp"

namespace annulus {

/// What `annulus bench ring --rates-out` wrote. Throws missing_input or bad_data.
Rates read_rates(const std::string& path);
/// Throws cannot_create.
void write_rates(const std::string& path, const Rates& rates);

}  // namespace annulus
