#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "runtime/chunk_filters.hpp"

namespace annulus {

/// Throws bad_data, starting with `what`, unless the parameters are those of integers, f32 or f64.
void require_scale_offset(const ChunkFilter& filter, const std::string& what);

/// Undoes HDF5's scaleoffset filter: elements are the chunk's minimum plus an unsigned number of
/// few bits, for floats divided by a power of ten. Throws bad_data unless `from` holds as many
/// elements as the parameters say, and they fit `most_bytes`; the parameters have passed
/// require_scale_offset().
void decode_scale_offset(const ChunkFilter& filter, std::size_t most_bytes,
                         const std::vector<std::byte>& from, std::vector<std::byte>& to);

}  // namespace annulus
