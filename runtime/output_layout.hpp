#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/types.hpp"
#include "runtime/selection.hpp"

namespace annulus {

/// A chunk with elements of several ranks, and who writes it.
struct SharedChunk {
  std::int64_t index = 0;  // row-major in the grid
  int owner = 0;
  std::vector<int> ranks;  // all that hold a part, the owner among them or not
};

/// How a tensor that is spread over ranks is cut into the chunks of one file, and which rank writes
/// which: every chunk has one writer. The same on all ranks, without communication.
class OutputLayout {
 public:
  /// Throws bad_data, starting with `what`, unless the parts of all ranks cover the shape exactly
  /// once. Of ranks with the same part only the lowest counts.
  OutputLayout(const std::string& what, const Shape& shape, std::int64_t element_bytes,
               std::vector<Selection> parts);

  const Shape& shape() const { return shape_; }
  const Shape& chunk() const { return chunk_; }
  std::int64_t chunk_bytes() const { return chunk_.elements() * element_bytes_; }
  std::int64_t chunks() const { return chunks_; }
  /// The part that `rank` contributes: empty where a lower rank holds the same.
  const Selection& part(int rank) const { return parts_[static_cast<std::size_t>(rank)]; }
  Shape begin_of(std::int64_t chunk) const;
  /// Chunks whose elements are all held by `rank`.
  std::vector<std::int64_t> exclusive_chunks(int rank) const;
  const std::vector<SharedChunk>& shared_chunks() const { return shared_; }
  /// Elements of `rank` in a chunk.
  std::int64_t elements(int rank, std::int64_t chunk) const;

 private:
  void choose_chunk();
  void assign(const std::string& what);
  Shape extent_of(std::int64_t chunk) const;
  void check_cover(const std::string& what, std::int64_t chunk, std::span<const int> ranks) const;

  Shape shape_;
  Shape chunk_;
  Shape grid_;
  std::int64_t chunks_ = 0;
  std::int64_t element_bytes_ = 0;
  std::vector<Selection> parts_;
  std::vector<std::int32_t> only_holder_;  // by chunk; -1: several
  std::vector<SharedChunk> shared_;
};

}  // namespace annulus
