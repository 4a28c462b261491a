#include "sharding/join_rectangles.hpp"

#include <algorithm>
#include <tuple>
#include <utility>

namespace annulus {
namespace {

// Rectangles with the same range `same` become one where they follow each other along the other.
std::vector<Slice> joined_along(std::vector<Slice> slices, Span Slice::*same, Span Slice::*along) {
  const auto order = [&](const Slice& slice) {
    return std::tuple((slice.*same).begin, (slice.*same).end, (slice.*along).begin);
  };
  std::stable_sort(slices.begin(), slices.end(),
                   [&](const Slice& a, const Slice& b) { return order(a) < order(b); });
  const auto follows = [&](const Slice& last, const Slice& next) {
    return last.band == Band{} && next.band == Band{} && last.*same == next.*same &&
           (last.*along).end == (next.*along).begin;
  };
  std::vector<Slice> joined;
  for (const Slice& slice : slices) {
    if (!joined.empty() && follows(joined.back(), slice)) {
      (joined.back().*along).end = (slice.*along).end;
    } else {
      joined.push_back(slice);
    }
  }
  return joined;
}

std::vector<Slice> joined_list(std::span<const Slice> given) {
  std::vector<Slice> slices(given.begin(), given.end());
  for (Slice& slice : slices) {
    if (slice.coverage(slice.q, slice.k) == Coverage::full) slice.band = Band{};
  }
  slices = joined_along(std::move(slices), &Slice::q, &Slice::k);
  return joined_along(std::move(slices), &Slice::k, &Slice::q);
}

}  // namespace

MaskSlices join_rectangles(const MaskSlices& mask) {
  if (mask.batch_offsets.empty()) return {joined_list(mask.slices), {}};
  MaskSlices joined;
  joined.batch_offsets.push_back(0);
  for (std::size_t b = 0; b + 1 < mask.batch_offsets.size(); ++b) {
    const std::vector<Slice> row = joined_list(mask.view().of_batch(static_cast<std::int64_t>(b)));
    joined.slices.insert(joined.slices.end(), row.begin(), row.end());
    joined.batch_offsets.push_back(static_cast<std::int64_t>(joined.slices.size()));
  }
  return joined;
}

}  // namespace annulus
