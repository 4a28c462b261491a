#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace annulus {

/// One filter of a dataset's pipeline; the ids are HDF5's.
struct ChunkFilter {
  static constexpr int kDeflate = 1;
  static constexpr int kShuffle = 2;
  static constexpr int kFletcher32 = 3;
  static constexpr int kSzip = 4;
  static constexpr int kNbit = 5;
  static constexpr int kScaleOffset = 6;

  int id = 0;
  std::uint32_t parameter = 0;  // of shuffle: bytes of an element

  friend bool operator==(const ChunkFilter&, const ChunkFilter&) = default;
};

/// HDF5's name of the filters accepted in a file, or an empty string.
std::string filter_name(int id);

/// Whether decode_chunk() knows every filter; HDF5 decodes the others.
bool is_decodable(std::span<const ChunkFilter> filters);

/// Fletcher's checksum as HDF5 defines it: sums of big-endian 16-bit words modulo 65535.
std::uint32_t fletcher32(std::span<const std::byte> data);

/// Undoes the pipeline of one stored chunk, in `buffer`, using `scratch`; bit i of `skipped` says
/// that filter i was not applied. Throws bad_data with the reason unless the result has exactly
/// `chunk_bytes` bytes: neither memory nor time is spent on a chunk that inflates to more.
void decode_chunk(std::span<const ChunkFilter> filters, std::uint32_t skipped,
                  std::int64_t chunk_bytes, std::vector<std::byte>& buffer,
                  std::vector<std::byte>& scratch);

}  // namespace annulus
