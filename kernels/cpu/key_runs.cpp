#include "kernels/cpu/key_runs.hpp"

#include <algorithm>
#include <cstddef>

#include "kernels/cpu/row_block.hpp"

namespace annulus::kernels {

std::span<const KeyRun> KeyRuns::find(std::span<const Slice> slices, Span queries, Span keys) {
  clipped_.clear();
  runs_.clear();
  for (const Slice& slice : slices) {
    const Slice part = clip(slice, queries, keys);
    if (!part.q.empty() && !part.k.empty()) clipped_.push_back(part);
  }
  std::sort(clipped_.begin(), clipped_.end(),
            [](const Slice& a, const Slice& b) { return a.k.begin < b.k.begin; });
  for (std::size_t first = 0; first < clipped_.size();) {
    KeyRun run{clipped_[first].k, true, {}};
    std::size_t end = first;
    while (end < clipped_.size() && clipped_[end].k.begin <= run.keys.end) {
      run.keys.end = std::max(run.keys.end, clipped_[end].k.end);
      run.full = run.full && clipped_[end].coverage(queries, clipped_[end].k) == Coverage::full;
      ++end;
    }
    run.slices = std::span(clipped_).subspan(first, end - first);
    runs_.push_back(run);
    first = end;
  }
  return runs_;
}

Span keys_seen(std::span<const Slice> slices, Span queries, Span keys) {
  Span seen;
  for (const Slice& slice : slices) {
    const Slice part = clip(slice, queries, keys);
    if (part.q.empty() || part.k.empty()) continue;
    seen = seen.empty() ? part.k
                        : Span{std::min(seen.begin, part.k.begin), std::max(seen.end, part.k.end)};
  }
  if (seen.empty()) return seen;
  return {seen.begin - (seen.begin - keys.begin) % kKeyTile, seen.end};
}

Span keys_in_run(const KeyRun& run, const Slice& slice, std::int64_t query) {
  if (!slice.q.contains(query)) return {};
  const Span kept = intersect(intersect(slice.k, slice.band.keys_of(query)), run.keys);
  if (kept.empty()) return {};
  return {kept.begin - run.keys.begin, kept.end - run.keys.begin};
}

}  // namespace annulus::kernels
