#pragma once

#include <functional>

#include "kernels/buffer.hpp"
#include "sharding/attention_plan.hpp"
#include "sharding/communicator.hpp"
#include "sharding/cost_model.hpp"

namespace annulus {
class Context;
}

namespace annulus::launch {

/// Of all ranks. Collective.
double largest(Communicator& ranks, double mine);

/// Seconds of the slowest rank, the fastest of some runs. A step on a device waits for the device.
/// Collective.
double timed(Communicator& ranks, int repeats, const std::function<void()>& step);

/// Where the work is, and the ranks that move what it reads.
struct Place {
  Device device;
  Communicator& ranks;

  void finish() const { synchronize(device, {}); }
};

/// What a perfect ring would keep up: what pairs and tiles take, from one causal attention over as
/// many rows as a rank has and from short documents; and how fast bytes move. In place and in one
/// launch where `place` could. Collective.
Rates measure_rates(Context& context, const Place& place, const PlanRequest& request,
                    const AttentionSizes& sizes, DType dtype, int repeats);

}  // namespace annulus::launch
