#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/types.hpp"
#include "runtime/checkpoint_output.hpp"

namespace annulus {

/// A dataset to make room for. An empty tensor has no chunks.
struct LayoutRequest {
  std::string path;
  DType dtype = DType::f32;
  Shape shape;
  Shape chunk;
  std::int64_t chunks = 0;
};

/// Bytes that follow a chunk's data: its Fletcher32 sum, little-endian.
inline constexpr std::int64_t kChunkTailBytes = 4;

/// Writes everything of an HDF5 file but its data into the empty file `descriptor`, and returns the
/// offset of every chunk of every dataset, in row-major order of the grid. A driver under HDF5
/// keeps the chunks it is handed from being written: whoever holds the data writes them in place,
/// at once from all ranks, with a parallel HDF5 or a serial one. Throws io naming `path`.
std::vector<std::vector<std::int64_t>> lay_out(int descriptor, const std::string& path,
                                               std::span<const LayoutRequest> datasets,
                                               std::span<const OutputAttribute> attributes);

}  // namespace annulus
