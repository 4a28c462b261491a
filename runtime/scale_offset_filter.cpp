#include "runtime/scale_offset_filter.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/error.hpp"

namespace annulus {
namespace {

// HDF5's order of the parameters.
enum Parameter : std::size_t {
  kScale,     // 0: floats by decimal digits, 2: integers
  kDigits,    // of floats
  kElements,  // of a chunk
  kClass,     // 0: integer, 1: float
  kElementBytes,
  kSign,         // 1: two's complement
  kOrder,        // 1: big-endian
  kFillDefined,  // then the largest number stands for the fill value
  kFill,
};

// Bits of a number, the size of the minimum, the minimum, all little-endian; then unused bytes.
constexpr std::size_t kMinimumAt = 5;
constexpr std::size_t kDataAt = 21;

struct Stored {
  unsigned bits = 0;
  std::uint64_t minimum = 0;
  const std::byte* data = nullptr;
  std::size_t elements = 0;
};

/// Takes numbers of any width, the first bit the highest.
class BitReader {
 public:
  explicit BitReader(const std::byte* data) : data_(data) {}

  std::uint64_t take(unsigned bits) {
    std::uint64_t value = 0;
    while (bits > 0) {
      const unsigned there = 8 - static_cast<unsigned>(at_ % 8);
      const unsigned count = std::min(bits, there);
      const auto byte = std::to_integer<unsigned>(data_[at_ / 8]);
      value = (value << count) | ((byte >> (there - count)) & ((1U << count) - 1U));
      at_ += count;
      bits -= count;
    }
    return value;
  }

 private:
  const std::byte* data_;
  std::size_t at_ = 0;
};

template <typename Element>
Element fill_value(const ChunkFilter& filter) {
  const std::uint32_t words[2] = {filter.parameter(kFill), filter.parameter(kFill + 1)};
  Element value{};
  std::memcpy(&value, words, sizeof value);
  return value;
}

template <typename Element>
Element restored(std::uint64_t number, std::uint64_t minimum, int digits) {
  Element least{};
  std::memcpy(&least, &minimum, sizeof least);
  if constexpr (std::is_floating_point_v<Element>) {
    using Integer = std::conditional_t<sizeof(Element) == 4, std::int32_t, std::int64_t>;
    const auto scale = static_cast<Element>(std::pow(10.0, digits));
    return static_cast<Element>(static_cast<Integer>(number)) / scale + least;
  } else {
    return static_cast<Element>(number + least);  // modulo 2^bits, signed ones too
  }
}

template <typename Element>
void decode(const ChunkFilter& filter, const Stored& stored, std::vector<std::byte>& to) {
  constexpr unsigned kAllBits = 8 * sizeof(Element);
  require(stored.bits <= kAllBits, ExitCode::bad_data, "scaleoffset of {} bits", stored.bits);
  if (stored.bits == kAllBits) {  // nothing was gained, and nothing subtracted
    std::copy_n(stored.data, to.size(), to.begin());
    return;
  }
  const bool fills = filter.parameter(kFillDefined) != 0 && stored.bits > 0;
  const std::uint64_t highest = (std::uint64_t{1} << stored.bits) - 1;
  const auto fill = fill_value<Element>(filter);
  const int digits = static_cast<int>(filter.parameter(kDigits));
  BitReader reader(stored.data);
  for (std::size_t i = 0; i < stored.elements; ++i) {
    const std::uint64_t number = reader.take(stored.bits);
    const Element value =
        fills && number == highest ? fill : restored<Element>(number, stored.minimum, digits);
    std::memcpy(to.data() + i * sizeof value, &value, sizeof value);
  }
}

void reverse_elements(std::size_t bytes, std::vector<std::byte>& data) {
  for (std::size_t at = 0; at + bytes <= data.size(); at += bytes) {
    std::reverse(data.begin() + static_cast<std::ptrdiff_t>(at),
                 data.begin() + static_cast<std::ptrdiff_t>(at + bytes));
  }
}

bool is_float(const ChunkFilter& filter) { return filter.parameter(kClass) == 1; }

void decode(const ChunkFilter& filter, const Stored& stored, std::size_t bytes,
            std::vector<std::byte>& to) {
  if (is_float(filter)) {
    return bytes == 4 ? decode<float>(filter, stored, to) : decode<double>(filter, stored, to);
  }
  switch (bytes) {
    case 1:
      return decode<std::uint8_t>(filter, stored, to);
    case 2:
      return decode<std::uint16_t>(filter, stored, to);
    case 4:
      return decode<std::uint32_t>(filter, stored, to);
    default:
      return decode<std::uint64_t>(filter, stored, to);
  }
}

}  // namespace

void require_scale_offset(const ChunkFilter& filter, const std::string& what) {
  const std::uint32_t bytes = filter.parameter(kElementBytes);
  const std::uint32_t scale = filter.parameter(kScale);
  const bool integers = filter.parameter(kClass) == 0 && scale == 2 &&
                        (bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8);
  const bool floats = is_float(filter) && scale == 0 && (bytes == 4 || bytes == 8);
  require(integers || floats, ExitCode::bad_data,
          "{}: scaleoffset of kind {} for class {} of {} bytes", what, scale,
          filter.parameter(kClass), bytes);
}

void decode_scale_offset(const ChunkFilter& filter, std::size_t most_bytes,
                         const std::vector<std::byte>& from, std::vector<std::byte>& to) {
  require(from.size() >= kDataAt, ExitCode::bad_data, "chunk too short for scaleoffset");
  Stored stored;
  std::uint32_t bits = 0;
  std::memcpy(&bits, from.data(), sizeof bits);
  std::memcpy(&stored.minimum, from.data() + kMinimumAt, sizeof stored.minimum);
  stored.bits = bits;
  stored.data = from.data() + kDataAt;
  stored.elements = filter.parameter(kElements);
  const std::size_t bytes = filter.parameter(kElementBytes);
  require(bits <= 8 * bytes && stored.elements * bytes <= most_bytes &&
              (stored.elements * bits + 7) / 8 <= from.size() - kDataAt,
          ExitCode::bad_data, "scaleoffset: {} elements of {} bits in {} bytes", stored.elements,
          bits, from.size() - kDataAt);
  to.assign(stored.elements * bytes, std::byte{0});
  decode(filter, stored, bytes, to);
  if (filter.parameter(kOrder) == 1) reverse_elements(bytes, to);
}

}  // namespace annulus
