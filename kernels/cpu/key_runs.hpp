#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/mask.hpp"

namespace annulus::kernels {

/// Consecutive keys that some slice keeps for some query of a tile.
struct KeyRun {
  Span keys;
  bool full = false;  // every query keeps every key: no element needs a mask
  std::span<const Slice> slices;
};

/// The runs of keys in which a tile of queries meets a tile of keys, in order. Keys between two
/// runs are never touched, so that garbage in padding cannot meet a weight of zero.
class KeyRuns {
 public:
  /// Valid until the next call.
  std::span<const KeyRun> find(std::span<const Slice> slices, Span queries, Span keys);

 private:
  std::vector<Slice> clipped_;
  std::vector<KeyRun> runs_;
};

/// Those of `keys`, in whole tiles of them, outside of which no slice keeps any for `queries`.
Span keys_seen(std::span<const Slice> slices, Span queries, Span keys);

/// The keys of a run that one query keeps through one slice, counted from the run's first key.
Span keys_in_run(const KeyRun& run, const Slice& slice, std::int64_t query);

}  // namespace annulus::kernels
