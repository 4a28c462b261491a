#include "runtime/hdf5_dataset.hpp"

#include <algorithm>
#include <limits>

#include "kernels/error.hpp"

namespace annulus {
namespace {

bool is_known(const StoredType& type) {
  using Kind = StoredType::Kind;
  switch (type.kind) {
    case Kind::floating:
      return type.dtype <= DType::i64 && is_floating(type.dtype) &&
             type.bytes == size_bytes(type.dtype);
    case Kind::integer:
      return type.bytes == 1 || type.bytes == 2 || type.bytes == 4 || type.bytes == 8;
    case Kind::boolean:
      return type.bytes == 1;
  }
  return false;
}

bool lies_in(std::int64_t offset, std::int64_t bytes, std::int64_t file_bytes) {
  return offset >= 0 && bytes >= 0 && offset <= file_bytes && bytes <= file_bytes - offset;
}

void require_chunks(const DatasetInfo& info, std::int64_t file_bytes, const std::string& what) {
  bool well = info.chunk.rank() == info.shape.rank() && info.chunks != nullptr;
  for (int dim = 0; well && dim < info.chunk.rank(); ++dim) well = info.chunk[dim] > 0;
  require(well, ExitCode::bad_data, "{}: chunks {} in {}", what, info.chunk.to_string(),
          info.shape.to_string());
  const std::int64_t bytes = checked_bytes(info.chunk, info.type.bytes, what);
  require(bytes <= kLargestChunkBytes, ExitCode::bad_data,
          "{}: chunks {} of {} bytes, at most {} are read; rewrite with h5repack", what,
          info.chunk.to_string(), bytes, kLargestChunkBytes);
  const std::int64_t cells = checked_bytes(chunk_grid(info), 1, what);
  std::int64_t next = 0;
  for (const StoredChunk& chunk : *info.chunks) {
    require(chunk.cell >= next && chunk.cell < cells, ExitCode::bad_data,
            "{}: chunk {} of {} out of order", what, chunk.cell, cells);
    next = chunk.cell + 1;
    require(chunk.bytes > 0 && chunk.bytes <= std::numeric_limits<std::int32_t>::max() &&
                lies_in(chunk.offset, chunk.bytes, file_bytes),
            ExitCode::bad_data, "{}: a chunk of {} bytes at {}, the file has {}: truncated", what,
            chunk.bytes, chunk.offset, file_bytes);
    require(!info.filters.empty() || chunk.bytes == bytes, ExitCode::bad_data,
            "{}: a chunk of {} bytes stored, expected {}", what, chunk.bytes, bytes);
  }
}

}  // namespace

std::int64_t checked_bytes(const Shape& shape, int element_bytes, const std::string& what) {
  std::int64_t bytes = element_bytes;
  bool fits = true;
  bool empty = false;
  for (const std::int64_t extent : shape.dims()) {
    empty = empty || extent == 0;
    fits = fits && extent >= 0 &&
           !__builtin_mul_overflow(bytes, std::max<std::int64_t>(extent, 1), &bytes);
  }
  require(fits || empty, ExitCode::bad_data, "{}: claims {} elements, more than 63 bits count",
          what, shape.to_string());
  return empty ? 0 : bytes;
}

Shape chunk_grid(const DatasetInfo& info) {
  Shape grid = info.shape;
  for (int dim = 0; dim < grid.rank(); ++dim) {
    grid[dim] = info.shape[dim] / info.chunk[dim] + (info.shape[dim] % info.chunk[dim] != 0);
  }
  return grid;
}

void require_consistent(const DatasetInfo& info, std::int64_t file_bytes, const std::string& what) {
  require(is_known(info.type), ExitCode::bad_data, "{}: stores an unknown type", what);
  for (const std::int64_t extent : info.shape.dims()) {
    require(extent >= 0, ExitCode::bad_data, "{}: claims an extent of {}", what, extent);
  }
  require(checked_bytes(info.shape, info.type.bytes, what) == info.data_bytes, ExitCode::bad_data,
          "{}: claims {} bytes for {}", what, info.data_bytes, info.shape.to_string());
  switch (info.storage) {
    case Storage::contiguous:
      return require(info.data_bytes == 0 || lies_in(info.file_offset, info.data_bytes, file_bytes),
                     ExitCode::bad_data,
                     "{}: {} of {} bytes at {} wanted, the file has {}: truncated", what,
                     info.shape.to_string(), info.data_bytes, info.file_offset, file_bytes);
    case Storage::chunked:
      require_decodable(info.filters, what);
      return require_chunks(info, file_bytes, what);
    case Storage::compact:
      return require(
          info.content && static_cast<std::int64_t>(info.content->size()) == info.data_bytes,
          ExitCode::bad_data, "{}: its data is incomplete", what);
  }
  throw Error(ExitCode::bad_data, what + ": its storage is of an unknown kind");
}

}  // namespace annulus
