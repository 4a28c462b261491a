#include "sharding/redistribution.hpp"

#include <algorithm>

#include "kernels/error.hpp"

namespace annulus {
namespace {

/// A run with its place in the shard.
struct PlacedRun {
  Span global;
  std::int64_t local = 0;
};

std::vector<PlacedRun> placed(const Runs& runs) {
  std::vector<PlacedRun> result;
  std::int64_t local = 0;
  for (const Span run : runs) {
    result.push_back({run, local});
    local += run.size();
  }
  return result;
}

/// Appends, or lengthens the last segment where both sides go on without a gap.
void append(std::vector<Segment1d>& segments, const Segment1d& next) {
  if (!segments.empty()) {
    Segment1d& last = segments.back();
    if (last.from + last.size == next.from && last.to + last.size == next.to) {
      last.size += next.size;
      return;
    }
  }
  segments.push_back(next);
}

bool holds(const Runs& runs, std::int64_t index) {
  return std::any_of(runs.begin(), runs.end(), [&](Span run) { return run.contains(index); });
}

/// Which part of a shared dimension gives `target` the index: its own, else one of the holders,
/// another for the next target.
int giving_part(const TensorLayout& from, int dim, int target, std::int64_t index) {
  const int own = from.sharding().part(target, dim);
  if (holds(from.runs_of_part(dim, own), index)) return own;
  std::vector<int> holders;
  for (int part = 0; part < from.sharding().parts(dim); ++part) {
    if (holds(from.runs_of_part(dim, part), index)) holders.push_back(part);
  }
  return holders[static_cast<std::size_t>(target) % holders.size()];
}

/// Where the holders of a shared dimension may change.
std::vector<std::int64_t> borders(const TensorLayout& from, int dim) {
  std::vector<std::int64_t> cuts;
  for (int part = 0; part < from.sharding().parts(dim); ++part) {
    for (const Span run : from.runs_of_part(dim, part)) {
      cuts.push_back(run.begin);
      cuts.push_back(run.end);
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

/// The part of `range` that `source` gives `target`.
Runs given(const TensorLayout& from, int dim, int source, int target, Span range) {
  if (!from.shares(dim)) return {range};
  const int part = from.sharding().part(source, dim);
  Runs result;
  std::int64_t begin = range.begin;
  for (const std::int64_t cut : borders(from, dim)) {
    const std::int64_t end = std::min(cut, range.end);
    if (end <= begin) continue;
    if (giving_part(from, dim, target, begin) == part) result.push_back({begin, end});
    begin = end;
  }
  return result;
}

/// Where runs of two shards meet; `pick` gives the parts of a common range that count.
template <typename Pick>
std::vector<Segment1d> meeting(const Runs& from, const Runs& to, const Pick& pick) {
  const std::vector<PlacedRun> held = placed(from);
  std::vector<Segment1d> segments;
  for (const PlacedRun& b : placed(to)) {
    for (const PlacedRun& a : held) {
      const Span both = intersect(b.global, a.global);
      if (both.empty()) continue;
      for (const Span span : pick(both)) {
        append(segments, {a.local + span.begin - a.global.begin,
                          b.local + span.begin - b.global.begin, span.size()});
      }
    }
  }
  return segments;
}

/// Replicas along unused axes: a target is served by the one at its own coordinates.
bool serves(const TensorLayout& from, int source, int target) {
  if (from.root()) return source == *from.root();
  const AxisTuple unused = from.sharding().unused_axes();
  return from.mesh().group_index(source, unused) == from.mesh().group_index(target, unused);
}

/// What of the source's shard the target holds too.
std::optional<ShardTransfer> shared_between(const TensorLayout& layout, int source, int target) {
  if (layout.root() || !serves(layout, source, target)) return std::nullopt;
  ShardTransfer transfer;
  for (int dim = 0; dim < layout.global_shape().rank(); ++dim) {
    transfer.segments.push_back(meeting(layout.runs(source, dim), layout.runs(target, dim),
                                        [](Span both) { return Runs{both}; }));
    if (transfer.segments.back().empty()) return std::nullopt;
  }
  return transfer;
}

}  // namespace

Shape ShardTransfer::message_shape() const {
  std::vector<std::int64_t> dims;
  for (const std::vector<Segment1d>& list : segments) {
    dims.push_back(0);
    for (const Segment1d& segment : list) dims.back() += segment.size;
  }
  return Shape(dims);
}

std::optional<ShardTransfer> transfer_between(const TensorLayout& from, const TensorLayout& to,
                                              int source, int target) {
  if (!serves(from, source, target) || (to.root() && target != *to.root())) return std::nullopt;
  ShardTransfer transfer;
  for (int dim = 0; dim < from.global_shape().rank(); ++dim) {
    transfer.segments.push_back(
        meeting(from.runs(source, dim), to.runs(target, dim),
                [&](Span both) { return given(from, dim, source, target, both); }));
    if (transfer.segments.back().empty()) return std::nullopt;
  }
  return transfer;
}

Redistribution plan_redistribution(const TensorLayout& from, const TensorLayout& to, int rank) {
  require(from.global_shape() == to.global_shape() && from.mesh().ranks() == to.mesh().ranks(),
          ExitCode::usage, "redistribute: {} cannot become {}: the shapes and ranks must be equal",
          from.to_string(), to.to_string());
  Redistribution plan;
  for (int peer = 0; peer < from.mesh().ranks(); ++peer) {
    if (auto send = transfer_between(from, to, rank, peer)) {
      send->peer = peer;
      plan.sends.push_back(std::move(*send));
    }
    if (auto receive = transfer_between(from, to, peer, rank)) {
      receive->peer = peer;
      plan.receives.push_back(std::move(*receive));
    }
  }
  return plan;
}

Redistribution shared_parts(const TensorLayout& layout, int rank) {
  Redistribution plan;
  for (int peer = 0; peer < layout.mesh().ranks(); ++peer) {
    auto send = peer == rank ? std::nullopt : shared_between(layout, rank, peer);
    if (!send) continue;
    auto receive = shared_between(layout, peer, rank);
    send->peer = receive->peer = peer;
    plan.sends.push_back(std::move(*send));
    plan.receives.push_back(std::move(*receive));
  }
  return plan;
}

}  // namespace annulus
