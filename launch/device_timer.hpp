#pragma once

#include <functional>
#include <vector>

namespace annulus::launch {

/// Milliseconds of device work in turn: warms every function up, then runs them one after another
/// `repeats` times. Returns the median of each. Alternating lets a drift of the clock touch all.
std::vector<double> alternating_medians_ms(const std::vector<std::function<void()>>& functions,
                                           int repeats);

}  // namespace annulus::launch
