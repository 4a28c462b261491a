#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/types.hpp"
#include "runtime/chunk_filters.hpp"

namespace annulus {

/// How a file stores one element.
struct StoredType {
  enum class Kind : std::uint8_t { floating, integer, boolean };

  Kind kind = Kind::floating;
  DType dtype = DType::f32;  // of Kind::floating
  int bytes = 4;
  bool is_signed = true;  // of Kind::integer
  bool big_endian = false;

  std::string to_string() const;  // "big-endian f32", "i64", "bool"
};

enum class Storage : std::uint8_t { contiguous, chunked, compact };

/// A chunk that was written.
struct StoredChunk {
  std::int64_t cell = 0;  // of the grid, in row-major order
  std::int64_t offset = 0;
  std::int64_t bytes = 0;
  std::uint32_t skipped = 0;  // bit i: filter i was not applied
};

/// All that is known of a dataset before any of its data is read: enough to read it without HDF5.
struct DatasetInfo {
  std::string path;
  Shape shape;
  StoredType type;
  Storage storage = Storage::contiguous;
  Shape chunk;                       // of Storage::chunked
  std::vector<ChunkFilter> filters;  // in the order in which they were applied
  std::int64_t file_offset = 0;      // of Storage::contiguous
  std::int64_t data_bytes = 0;       // elements × bytes of one
  /// Of Storage::chunked: the chunks in the order of their cells, and the element that stands,
  /// as stored, where there is none.
  std::shared_ptr<const std::vector<StoredChunk>> chunks;
  std::array<std::byte, 8> fill{};
  /// Of Storage::compact: the data.
  std::shared_ptr<const std::vector<std::byte>> content;
};

/// HDF5 needs a chunk in memory as a whole, and so do we.
inline constexpr std::int64_t kLargestChunkBytes = std::int64_t{1} << 30;

/// Elements × bytes of one; throws bad_data when 63 bits cannot hold it.
std::int64_t checked_bytes(const Shape& shape, int element_bytes, const std::string& what);

/// Cells of the chunks' grid in each dimension.
Shape chunk_grid(const DatasetInfo& info);

/// Throws bad_data unless everything fits everything else and a file of `file_bytes`: after it no
/// reader can leave the file, its buffers or the grid.
void require_consistent(const DatasetInfo& info, std::int64_t file_bytes, const std::string& what);

}  // namespace annulus
