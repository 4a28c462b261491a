#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace annulus {

inline constexpr std::size_t kMostFilters = 8;

/// One filter of a dataset's pipeline; the ids are HDF5's.
struct ChunkFilter {
  static constexpr int kDeflate = 1;
  static constexpr int kShuffle = 2;
  static constexpr int kFletcher32 = 3;
  static constexpr int kSzip = 4;
  static constexpr int kNbit = 5;
  static constexpr int kScaleOffset = 6;

  int id = 0;
  std::vector<std::uint32_t> parameters;  // as HDF5 stores them with the dataset

  /// Parameter i, or 0 where the file has fewer.
  std::uint32_t parameter(std::size_t i) const { return i < parameters.size() ? parameters[i] : 0; }

  friend bool operator==(const ChunkFilter&, const ChunkFilter&) = default;
};

/// HDF5's name of the filters accepted in a file, or an empty string.
std::string filter_name(int id);

/// Throws bad_data, starting with `what`, unless decode_chunk() can undo the filters: every name
/// above, with parameters that HDF5 writes for elements of whole bytes; szip where this build has
/// its library.
void require_decodable(std::span<const ChunkFilter> filters, const std::string& what);

/// Fletcher's checksum as HDF5 defines it: sums of big-endian 16-bit words modulo 65535. Pieces of
/// data may be added one after the other, while each is still in the cache.
class Fletcher32 {
 public:
  /// An odd number of bytes only in the last call.
  void add(std::span<const std::byte> data);
  std::uint32_t value() const;

 private:
  std::uint64_t first_ = 0;
  std::uint64_t second_ = 0;
};

std::uint32_t fletcher32(std::span<const std::byte> data);

inline constexpr std::size_t kFletcherBytes = 4;

/// Throws bad_data unless `stored`, which follows the data in a chunk, is the checksum found.
void require_fletcher32(std::uint32_t found, std::span<const std::byte, kFletcherBytes> stored);

/// Undoes the pipeline of one stored chunk, in `buffer`, using `scratch`; bit i of `skipped` says
/// that filter i was not applied. Throws bad_data with the reason unless the result has exactly
/// `chunk_bytes` bytes: neither memory nor time is spent on a chunk that inflates to more.
void decode_chunk(std::span<const ChunkFilter> filters, std::uint32_t skipped,
                  std::int64_t chunk_bytes, std::vector<std::byte>& buffer,
                  std::vector<std::byte>& scratch);

}  // namespace annulus
