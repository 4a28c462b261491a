#include <algorithm>
#include <thread>

#include "kernels/cpu/backward_keys.hpp"

namespace annulus::kernels {

AccumulationOrder::AccumulationOrder(std::span<const Slice> slices, const RowBlock& rows,
                                     std::int64_t chunk_keys, std::int64_t tile_rows)
    : tiles_((rows.rows() + tile_rows - 1) / tile_rows), next_(static_cast<std::size_t>(tiles_)) {
  const std::int64_t chunks = (rows.keys.size() + chunk_keys - 1) / chunk_keys;
  const std::int64_t heads = rows.q_heads.size();
  turns_.assign(static_cast<std::size_t>(chunks * tiles_), -1);
  for (const Slice& slice : slices) {
    for (std::int64_t chunk = slice.k.begin / chunk_keys; chunk * chunk_keys < slice.k.end;
         ++chunk) {
      const Span keys = intersect(rows.keys, {chunk * chunk_keys, (chunk + 1) * chunk_keys});
      const Span queries = clip(slice, rows.queries, keys).q;
      if (queries.empty()) continue;
      const std::int64_t last_row = queries.end * heads - 1;
      for (std::int64_t tile = queries.begin * heads / tile_rows; tile <= last_row / tile_rows;
           ++tile) {
        turn(chunk, tile) = 0;
      }
    }
  }
  for (std::int64_t tile = 0; tile < tiles_; ++tile) {
    std::int32_t next = 0;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (meets(chunk, tile)) turn(chunk, tile) = next++;
    }
  }
}

void AccumulationOrder::wait(std::int64_t chunk, std::int64_t tile) const {
  const std::atomic<std::int32_t>& next = next_[static_cast<std::size_t>(tile)];
  while (next.load(std::memory_order_acquire) != turn(chunk, tile)) std::this_thread::yield();
}

void AccumulationOrder::pass(std::int64_t tile) {
  next_[static_cast<std::size_t>(tile)].fetch_add(1, std::memory_order_release);
}

}  // namespace annulus::kernels
