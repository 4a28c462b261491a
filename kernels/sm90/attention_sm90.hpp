#pragma once

#include "kernels/attention.hpp"
#include "kernels/sm90/backward_launch.hpp"
#include "kernels/sm90/forward_launch.hpp"

namespace annulus::kernels::sm90 {

/// The Hopper backend; its reasons for refusing name what it was given and what it takes.
std::span<const AttentionBackend> backends();

/// One launch over several segments of keys, each with its own slices (call.problem's keys, values
/// and mask are not read, but give kv_heads and dtypes). Throws usage where one is unsupported.
void forward_segments(const ForwardCall& call, std::span<const ForwardSegment> segments);

}  // namespace annulus::kernels::sm90
