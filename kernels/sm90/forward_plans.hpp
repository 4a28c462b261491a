#pragma once

#include <memory>

#include "kernels/sm90/forward_work.hpp"

/// Plans of the launches before, for calls that repeat a mask: planning hundreds of documents takes
/// as long as computing them.
namespace annulus::kernels::sm90 {

struct ForwardPlan {
  double pairs = 0.0;  // that the tiles compute
  ForwardWork work;
};

std::shared_ptr<const ForwardPlan> forward_plan(std::span<const ForwardSegment> segments,
                                                std::int64_t batch, std::int64_t seq_q,
                                                const TileShape& tile);

}  // namespace annulus::kernels::sm90
