#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "runtime/chunk_filters.hpp"

namespace annulus {

/// Throws bad_data, starting with `what`, unless the parameters are those of elements of 1, 2, 4 or
/// 8 bytes and this build has libaec; no_szip.cpp stands in where it has not.
void require_szip(const ChunkFilter& filter, const std::string& what);

/// Decodes `from` into `to`. Throws bad_data unless the data is complete and not longer than
/// `most_bytes`; the parameters have passed require_szip().
void decode_szip(const ChunkFilter& filter, std::size_t most_bytes,
                 const std::vector<std::byte>& from, std::vector<std::byte>& to);

}  // namespace annulus
