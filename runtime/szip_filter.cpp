#include "runtime/szip_filter.hpp"

#include <cstdint>
#include <cstring>

extern "C" {  // libaec's header leaves it out
#include <szlib.h>
}

#include "kernels/error.hpp"

namespace annulus {
namespace {

// HDF5's order of the parameters.
enum Parameter : std::size_t { kMask, kBlockElements, kElementBits, kLineElements };

constexpr std::size_t kLengthBytes = 4;  // of the decoded data, before the stream

SZ_com_t library_parameters(const ChunkFilter& filter) {
  SZ_com_t parameters{};
  parameters.options_mask = static_cast<int>(filter.parameter(kMask));
  parameters.bits_per_pixel = static_cast<int>(filter.parameter(kElementBits));
  parameters.pixels_per_block = static_cast<int>(filter.parameter(kBlockElements));
  parameters.pixels_per_scanline = static_cast<int>(filter.parameter(kLineElements));
  return parameters;
}

}  // namespace

void require_szip(const ChunkFilter& filter, const std::string& what) {
  const std::uint32_t bits = filter.parameter(kElementBits);
  const std::uint32_t block = filter.parameter(kBlockElements);
  const std::uint32_t line = filter.parameter(kLineElements);
  const bool well = (bits == 8 || bits == 16 || bits == 32 || bits == 64) && block >= 2 &&
                    block <= SZ_MAX_PIXELS_PER_BLOCK && block % 2 == 0 && line >= block &&
                    line <= SZ_MAX_PIXELS_PER_SCANLINE && filter.parameter(kMask) < 256;
  require(well, ExitCode::bad_data,
          "{}: szip with {} bits an element, {} elements a block, {} a line", what, bits, block,
          line);
}

void decode_szip(const ChunkFilter& filter, std::size_t most_bytes,
                 const std::vector<std::byte>& from, std::vector<std::byte>& to) {
  require(from.size() > kLengthBytes, ExitCode::bad_data, "chunk too short for szip");
  std::uint32_t length = 0;
  std::memcpy(&length, from.data(), kLengthBytes);
  require(length <= most_bytes, ExitCode::bad_data, "a chunk decodes to {} bytes, more than its {}",
          length, most_bytes);
  to.assign(length, std::byte{0});
  SZ_com_t parameters = library_parameters(filter);
  std::size_t decoded = to.size();
  const int status = SZ_BufftoBuffDecompress(to.data(), &decoded, from.data() + kLengthBytes,
                                             from.size() - kLengthBytes, &parameters);
  require(status == SZ_OK && decoded == to.size(), ExitCode::bad_data,
          "szip failed: {} of {} bytes, status {}", decoded, to.size(), status);
}

}  // namespace annulus
